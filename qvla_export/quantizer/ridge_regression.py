"""Ridge regression with fewer rows than unknowns; the ridge predicts left-out rows best."""

import numpy as np
from numpy.typing import NDArray

# Ridges that are tried, as multiples of the mean row's square.
RIDGES = tuple(10.0 ** (step / 2) for step in range(-4, 5))


def least_changes(
    slopes: NDArray[np.float32], misses: NDArray[np.float64], fold: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the changes that answer what rows miss, with the ridge that predicts best.

    Args:
        slopes: float32 [rows, scales].
        misses: of each row.  float64 [rows]
        fold: rows of one number are left out together.  int64 [rows]

    Returns:
        Minimize |misses + slopes @ changes|^2 + ridge |changes|^2; zeros where no ridge predicts
        rows that were left out better than no change.  float64 [scales]
    """
    kernel = (slopes @ slopes.T).astype(np.float64)
    unit = float(np.trace(kernel)) / len(kernel)
    best, least = None, float(np.square(misses).sum())
    for ridge in RIDGES if unit else ():
        left = sum(
            _left_out(kernel, misses, fold == number, ridge * unit) for number in np.unique(fold)
        )
        if left < least:
            best, least = ridge, left
    if best is None:
        return np.zeros(slopes.shape[1])
    answers = _solved(kernel, misses, best * unit)
    changes: NDArray[np.float64] = -(slopes.T @ answers)
    return changes


def _left_out(
    kernel: NDArray[np.float64], misses: NDArray[np.float64], out: NDArray[np.bool_], ridge: float
) -> float:
    """Return the squares that rows still miss when the others choose the changes."""
    used = ~out
    answers = _solved(kernel[np.ix_(used, used)], misses[used], ridge)
    return float(np.square(misses[out] - kernel[np.ix_(out, used)] @ answers).sum())


def _solved(
    kernel: NDArray[np.float64], misses: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    damped = kernel + ridge * np.eye(len(kernel))
    return np.linalg.solve(damped, misses).astype(np.float64)

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
    if not unit:
        return np.zeros(slopes.shape[1])
    values, vectors = np.linalg.eigh(kernel)
    coordinates = vectors.T @ misses
    best, least = None, float(np.square(misses).sum())
    for ridge in RIDGES:
        inverse = 1 / (values + ridge * unit)
        left = _left_out(vectors, inverse, coordinates, fold)
        if left < least:
            best, least = inverse, left
    if best is None:
        return np.zeros(slopes.shape[1])
    answers = vectors @ (best * coordinates)
    changes: NDArray[np.float64] = -(slopes.T @ answers)
    return changes


def _left_out(
    vectors: NDArray[np.float64],
    inverse: NDArray[np.float64],
    coordinates: NDArray[np.float64],
    fold: NDArray[np.int64],
) -> float:
    """Return the squares that runs of rows miss when the other rows choose the changes.

    With P the inverse of the damped kernel, a run misses P[run, run]^-1 (P misses)[run]: what a
    solution of the other rows alone leaves, without solving for each.
    """
    left = 0.0
    for number in np.unique(fold):
        own = vectors[fold == number]
        block = (own * inverse) @ own.T
        left += float(np.square(np.linalg.solve(block, own @ (inverse * coordinates))).sum())
    return left

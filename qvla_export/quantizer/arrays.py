"""Array operations that the elimination takes as an argument, and those of numpy.

What numpy arrays and torch tensors write alike (slices, `@`, arithmetic, `reshape`) is not here.
`measurement.torch_arrays` has those of torch, on any device.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# Of the library that the operations are of.
Array = Any
Float = type[np.float32] | type[np.float64]
# Columns of a factor that are found together.
_FACTOR_BLOCK = 128


class Arrays(Protocol):
    """What the elimination asks of a library; an array has the dtype that it was put with."""

    def put(self, values: NDArray[Any]) -> Array:
        """Return an array of these values; it may share their memory."""
        ...

    def get(self, array: Array) -> NDArray[Any]:
        """Return an array's values; they may share its memory."""
        ...

    def zeros(self, shape: tuple[int, ...], like: Array) -> Array:
        """Return zeros with the dtype and the place of another array."""
        ...

    def nearest(self, values: Array, scales: Array, low: Array, high: Array, out: Array) -> None:
        """Write the integers within bounds that are nearest to values / scales, half to even."""
        ...

    def above_diagonal(self, matrix: Array) -> Array:
        """Return a matrix with zeros on and below its diagonal."""
        ...

    def factor(self, matrix: NDArray[Any]) -> Array:
        """Return the upper triangle R with matrix = R R^T; the matrix may be used up.

        Found in the matrix's dtype, in float64 where rounding leaves it not positive.
        """
        ...

    def solve(self, matrix: Array, right: Array) -> Array:
        """Return matrix^-1 right."""
        ...


class NumpyArrays:
    """numpy's, on the CPU; see `Arrays`."""

    def put(self, values: NDArray[Any]) -> Array:
        """Return the values themselves."""
        return values

    def get(self, array: Array) -> NDArray[Any]:
        """Return the array itself."""
        values: NDArray[Any] = array
        return values

    def zeros(self, shape: tuple[int, ...], like: Array) -> Array:
        """Return zeros."""
        return np.zeros(shape, like.dtype)

    def nearest(self, values: Array, scales: Array, low: Array, high: Array, out: Array) -> None:
        """Write the nearest integers."""
        np.divide(values, scales, out=out)
        np.rint(out, out=out)
        # Two calls take half the time of np.clip on arrays as small as a step's.
        np.minimum(out, high, out=out)
        np.maximum(out, low, out=out)

    def above_diagonal(self, matrix: Array) -> Array:
        """Return a matrix with zeros on and below its diagonal."""
        return np.triu(matrix, 1)

    def factor(self, matrix: NDArray[Any]) -> Array:
        """Return the upper triangle."""
        if matrix.dtype == np.float64:
            return _small_factor(matrix)
        diagonal = matrix.diagonal().copy()
        try:
            _factor_in_place(matrix)
        except np.linalg.LinAlgError:
            # What is below the diagonal is untouched.
            lower = np.tril(matrix, -1).astype(np.float64)
            matrix = _small_factor(lower + lower.T + np.diag(diagonal)).astype(np.float32)
        for row, values in enumerate(matrix):
            values[:row] = 0
        return matrix

    def solve(self, matrix: Array, right: Array) -> Array:
        """Return matrix^-1 right."""
        return np.linalg.solve(matrix, right)


def _small_factor(matrix: NDArray[np.float64]) -> NDArray[Any]:
    """Return the upper triangle R with matrix = R R^T."""
    # With J the reversal, J M J = L L^T makes M = R R^T with R = J L J.
    upper: NDArray[Any] = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1].copy()
    return upper


def _factor_in_place(matrix: NDArray[np.float32]) -> None:
    """Write the upper triangle R with matrix = R R^T over that of the matrix, last columns first.

    Nearly all of it are products, which are faster than what numpy's Cholesky is made of; float64
    for blocks on the diagonal.

    Raises:
        LinAlgError: the matrix is not positive; what is below the diagonal is as it was.
    """
    for start in reversed(range(0, len(matrix), _FACTOR_BLOCK)):
        stop = min(start + _FACTOR_BLOCK, len(matrix))
        inside, above = slice(start, stop), slice(0, start)
        later = matrix[inside, stop:]
        whole = matrix[inside, inside].astype(np.float64)
        lower = np.tril(whole, -1)
        square = lower + lower.T + np.diag(whole.diagonal()) - later @ later.T
        own = _small_factor(square)
        matrix[inside, inside] = lower + own
        column = matrix[above, inside] - matrix[above, stop:] @ later.T
        matrix[above, inside] = column @ np.linalg.inv(own).T.astype(np.float32)

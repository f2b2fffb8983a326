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

    def rint(self, array: Array) -> Array:
        """Return the nearest integers, half to even."""
        ...

    def clip(self, array: Array, low: Array | float, high: Array | float) -> Array:
        """Return an array within bounds, both of them numbers or both arrays of its shape."""
        ...

    def above_diagonal(self, matrix: Array) -> Array:
        """Return a matrix with zeros on and below its diagonal."""
        ...

    def factor(self, matrix: NDArray[np.float64], dtype: Float) -> Array:
        """Return the upper triangle R with matrix = R R^T, found in float64."""
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

    def rint(self, array: Array) -> Array:
        """Return the nearest integers."""
        return np.rint(array)

    def clip(self, array: Array, low: Array | float, high: Array | float) -> Array:
        """Return an array within bounds."""
        # Two calls take half the time of np.clip on arrays as small as a step's.
        return np.maximum(np.minimum(array, high), low)

    def above_diagonal(self, matrix: Array) -> Array:
        """Return a matrix with zeros on and below its diagonal."""
        return np.triu(matrix, 1)

    def factor(self, matrix: NDArray[np.float64], dtype: Float) -> Array:
        """Return the upper triangle."""
        # With J the reversal, J M J = L L^T makes M = R R^T with R = J L J.
        return np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1].astype(dtype)

    def solve(self, matrix: Array, right: Array) -> Array:
        """Return matrix^-1 right."""
        return np.linalg.solve(matrix, right)

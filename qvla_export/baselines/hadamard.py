"""Hadamard rotations of a layer's inputs: large inputs are spread before weights are rounded.

As QuaRot rotates them (arXiv 2404.00456), in blocks. What rotates the inputs at run time is left
to whoever deploys it; here weights are rotated back, which is the same map.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_LARGEST = 64


def rotation_size(inputs: int) -> int:
    """Return the size of a layer's blocks: the largest power of two, to 64, in its inputs."""
    return min(_LARGEST, inputs & -inputs)


def hadamard(size: int) -> NDArray[np.float32]:
    """Return Sylvester's matrix of a power of two, of length 1: symmetric and its own inverse.

    Returns:
        float32 [size, size]
    """
    matrix: NDArray[np.float64] = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    unit: NDArray[np.float32] = (matrix / np.sqrt(size)).astype(np.float32)
    return unit


def rotate(rows: NDArray[Any], size: int) -> NDArray[np.float32]:
    """Rotate each block of inputs; twice gives the rows again.

    Args:
        rows: [channels, inputs], inputs a multiple of `size`.
        size: of a block.

    Returns:
        float32 [channels, inputs]
    """
    blocks = rows.reshape(len(rows), -1, size).astype(np.float32)
    rotated: NDArray[np.float32] = (blocks @ hadamard(size)).reshape(rows.shape)
    return rotated

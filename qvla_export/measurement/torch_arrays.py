"""The elimination's array operations in torch, on a CPU or a GPU; see `quantizer.arrays`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.quantizer.arrays import Float
from qvla_export.quantizer.elimination import Elimination

_DTYPES = {np.float32: torch.float32, np.float64: torch.float64}


@dataclass(frozen=True)
class TorchArrays:
    """torch's, on one device."""

    device: torch.device

    def put(self, values: NDArray[Any]) -> Tensor:
        """Return the values on the device."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def get(self, array: Tensor) -> NDArray[Any]:
        """Return an array's values."""
        values: NDArray[Any] = array.cpu().numpy()
        return values

    def zeros(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros(shape, dtype=like.dtype, device=self.device)

    def rint(self, array: Tensor) -> Tensor:
        """Return the nearest integers."""
        return torch.round(array)

    def clip(self, array: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Return an array within bounds."""
        return torch.clamp(array, low, high)  # type: ignore[arg-type]  # both numbers or both arrays

    def above_diagonal(self, matrix: Tensor) -> Tensor:
        """Return a matrix with zeros on and below its diagonal."""
        return torch.triu(matrix, 1)

    def factor(self, matrix: NDArray[np.float64], dtype: Float) -> Tensor:
        """Return the upper triangle."""
        # As in `quantizer.arrays.NumpyArrays.factor`.
        lower = torch.linalg.cholesky(self.put(matrix).flip(0, 1))
        upper: Tensor = lower.flip(0, 1).to(_DTYPES[dtype])
        return upper

    def solve(self, matrix: Tensor, right: Tensor) -> Tensor:
        """Return matrix^-1 right."""
        solved: Tensor = torch.linalg.solve(matrix, right)
        return solved


def elimination_on(device: torch.device) -> Elimination:
    """Return what eliminates on a device: numpy on the CPU, where its small steps cost less."""
    return Elimination() if device.type == "cpu" else Elimination(TorchArrays(device))

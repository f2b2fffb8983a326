"""The elimination's array operations in torch, on a CPU or a GPU; see `quantizer.arrays`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.quantizer.elimination import Elimination


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

    def nearest(
        self, values: Tensor, scales: Tensor, low: Tensor, high: Tensor, out: Tensor
    ) -> None:
        """Write the nearest integers."""
        torch.div(values, scales, out=out)
        torch.round(out, out=out)
        torch.minimum(out, high, out=out)
        torch.maximum(out, low, out=out)

    def above_diagonal(self, matrix: Tensor) -> Tensor:
        """Return a matrix with zeros on and below its diagonal."""
        return torch.triu(matrix, 1)

    def factor(self, matrix: NDArray[Any]) -> Tensor:
        """Return the upper triangle."""
        # As in `quantizer.arrays.NumpyArrays.factor`.
        backwards = self.put(matrix).flip(0, 1)
        lower, fault = torch.linalg.cholesky_ex(backwards)
        if fault.any():
            lower = torch.linalg.cholesky(backwards.double()).to(backwards.dtype)
        upper: Tensor = lower.flip(0, 1)
        return upper

    def solve(self, matrix: Tensor, right: Tensor) -> Tensor:
        """Return matrix^-1 right."""
        solved: Tensor = torch.linalg.solve(matrix, right)
        return solved


def elimination_on(device: torch.device) -> Elimination:
    """Return what eliminates on a device: numpy on the CPU, where its small steps cost less."""
    return Elimination() if device.type == "cpu" else Elimination(TorchArrays(device))

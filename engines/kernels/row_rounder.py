"""What rounds rows on a device, with the norm before them: one launch for each call."""

from dataclasses import dataclass
from typing import Literal

import torch

from engines.base import EngineError
from engines.kernels.launches import launching
from engines.kernels.rounded_rows import Rounding, round_rows
from engines.kernels.rounding_form import MOST_INPUTS, rounding_form


@dataclass(frozen=True)
class Norm:
    """A norm of rows, computed in float32."""

    # "rms": without mean and biases.
    kind: Literal["rms", "layer"]
    # float32 [inputs]
    weights: torch.Tensor
    # float32 [inputs]; None for zeros.
    biases: torch.Tensor | None
    epsilon: float
    # Whether its result is rounded to float16.
    halves: bool


class RowRounder:
    """Rounds rows to int8 codes around 0, after a norm or as they are."""

    def __init__(
        self, step: torch.Tensor, inputs: int, norm: Norm | None, device: torch.device
    ) -> None:
        """Take what is constant.

        Args:
            step: of the codes, one number.
            inputs: of a row.
            norm: before the rounding; None for none.
            device: a GPU; or the CPU, where Triton's interpreter runs.

        Raises:
            EngineError: rows that are too long, or a norm of other rows.
        """
        if not 0 < inputs <= MOST_INPUTS:
            raise EngineError(f"rows to round have 1 to {MOST_INPUTS} inputs, got {inputs}")
        self.inputs = inputs
        self.norm = None if norm is None else norm.kind
        self._step = step.reshape(1).float().to(device)
        self._epsilon = 0.0 if norm is None else norm.epsilon
        kind, halves = ("none", False) if norm is None else (norm.kind, norm.halves)
        self._form, self._warps = rounding_form(inputs, kind, halves)
        self._weights = self._biases = self._step
        if norm is not None:
            biases = torch.zeros(inputs) if norm.biases is None else norm.biases
            if norm.weights.shape != (inputs,) or biases.shape != (inputs,):
                raise EngineError(
                    f"a norm of {inputs} inputs has as many weights and biases, got "
                    f"{list(norm.weights.shape)} and {list(biases.shape)}"
                )
            self._weights = norm.weights.float().contiguous().to(device)
            self._biases = biases.float().contiguous().to(device)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return int8 codes of rows [..., inputs], float16, bfloat16 or float32.

        Raises:
            EngineError: rows of another length; or Triton cannot compile for this GPU.
        """
        if rows.dim() < 1 or rows.shape[-1] != self.inputs:
            raise EngineError(f"rows must have {self.inputs} inputs, got {list(rows.shape)}")
        whole = rows.contiguous()
        codes = torch.empty(whole.shape, dtype=torch.int8, device=whole.device)
        count = whole.numel() // self.inputs
        fixed = (self._weights, self._biases, self._step, self.inputs, self._epsilon)
        if count:
            with launching(whole.device):
                options = {"num_warps": self._warps, "enable_fp_fusion": False}
                round_rows[(count,)](Rounding(whole, codes, *fixed), self._form, **options)
        return codes

"""The noun `QuantizedWeight`: channels of one width as they are stored. numpy only."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.scale_search import Steps
from qvla_export.quantizer.two_level_scales import expanded_codes
from qvla_export.shared.errors import QvlaError


@dataclass(frozen=True)
class QuantizedWeight:
    """Channels of one width, as they are stored."""

    # Codes; the rounded weights themselves at 16 bits.
    # int8 (2, 4, 8 and, all zero, 0 bits) or float16 (16 bits)  [channels, inputs]
    codes: NDArray[np.int8] | NDArray[np.float16]
    # Positive; as stored, so float32 or float16.  [channels, groups]; no groups at 16 and 0 bits,
    # one where there are multipliers
    scales: NDArray[np.float32] | NDArray[np.float16]
    bits: int
    # Inputs that share a scale; None for one scale per channel.
    group_size: int | None
    # Codes that stand for 0; None where all are 0.  int8 [channels, groups]
    zero_points: NDArray[np.int8] | None = None
    # Of each group, times its channel's scale; None where scales have one level.
    # uint8 [channels, groups]
    multipliers: NDArray[np.uint8] | None = None

    def expanded(self) -> NDArray[np.int8]:
        """Return the codes of channels of one scale each.  int8 [channels, inputs]

        Raises:
            QvlaError: groups have scales or zero points of their own, or there are no codes.
        """
        if self.bits in (2, 4, 8) and self.scales.shape[1] == 1 and self.zero_points is None:
            codes = self.codes.astype(np.int8)
            if self.multipliers is None or self.group_size is None:
                return codes
            return expanded_codes(codes, self.multipliers, self.group_size)
        raise QvlaError(
            f"codes of {self.bits} bits with {self.scales.shape[1]} scales a channel are no "
            "integers of one scale; quantize with scales of two levels"
        )

    def dequantize(self) -> NDArray[np.float32]:
        """Return the weights an engine computes with.  float32 [channels, inputs]"""
        weights = self.codes.astype(np.float32)
        if self.scales.shape[1] == 0:
            return weights
        scales = self.scales.astype(np.float32)
        if self.multipliers is not None:
            scales = scales * self.multipliers
        stored = Steps(scales, self.zero_points)
        if self.group_size is not None:
            stored = stored.by_input(self.group_size, weights.shape[1])
        if stored.zero_points is not None:
            weights -= stored.zero_points
        return weights * stored.scales

    @property
    def nbytes(self) -> int:
        """Packed size in bytes, scales, zero points and multipliers included."""
        zeros = 0 if self.zero_points is None else self.zero_points.size
        packed = sum(-(-count * self.bits // 8) for count in (self.codes.size, zeros))
        factors = 0 if self.multipliers is None else self.multipliers.nbytes
        return packed + self.scales.nbytes + factors

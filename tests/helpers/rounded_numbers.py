"""Rounding to 8-bit codes, as `QuantizeLinear` and `DequantizeLinear` do it."""

import numpy as np
from numpy.typing import NDArray


def int8_rounded(values: NDArray[np.float32], scale: np.float32) -> NDArray[np.float32]:
    """Return the numbers that the codes of values stand for, ties to even."""
    codes: NDArray[np.float32] = np.clip(np.rint(values / scale), -128, 127).astype(np.float32)
    return codes * scale

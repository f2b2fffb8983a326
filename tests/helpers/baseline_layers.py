"""Baselines that no library is needed for, for the tests of baselines."""

from collections.abc import Callable
from typing import Any

import numpy as np

from qvla_export.baselines.baseline import Baseline, BaselineLayer
from qvla_export.baselines.methods import BaselineRequest
from qvla_export.policies.layers import weight_rows
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.quantize import QuantizerSpec, WidthRule, quantize_channels
from qvla_export.quantizer.quantized_weight import QuantizedWeight

ROUND_TO_NEAREST = QuantizerSpec({4: WidthRule(64, "max", 16), 8: WidthRule(None, "max", 32)})


def baseline_of(policy: OftPolicy, layer: Callable[[str, Any], BaselineLayer]) -> Baseline:
    layers = {name: layer(name, weight_rows(found)) for name, found in policy.layers().items()}
    return Baseline(
        BaselineRequest("max", 4, group_size=64), layers, policy.digest, "c" * 64, seconds=1.5
    )


def as_floats(name: str, rows: Any) -> BaselineLayer:
    return BaselineLayer(QuantizedWeight(rows, np.zeros((len(rows), 0), np.float32), 32, None))


def to_nearest(name: str, rows: Any) -> BaselineLayer:
    return BaselineLayer(quantize_channels(rows, 4, ROUND_TO_NEAREST))

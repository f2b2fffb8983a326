"""Max calibration, SmoothQuant and AWQ by NVIDIA's modelopt (`modelopt.torch.quantization`)."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from modelopt.torch import quantization as mtq
from numpy.typing import NDArray
from torch import nn

from qvla_export.baselines.baseline import BaselineLayer
from qvla_export.baselines.layer_adapter import coded, hand_over, module_names
from qvla_export.baselines.methods import BaselineRequest
from qvla_export.baselines.quantized import Calibration, Quantized
from qvla_export.policies.layers import layer_shapes, traced_layers
from qvla_export.quantizer.activations import ActivationRanges


def quantize(calibration: Calibration) -> Quantized:
    """Quantize all layers by `mtq.quantize` with the algorithm of its published preset."""
    policy, request = calibration.policy, calibration.request
    shapes = layer_shapes(traced_layers(policy))
    handed = hand_over(policy, request.group_size)
    names = module_names(policy.module, handed)
    config = _config(request, list(names.values()))
    mtq.quantize(policy.module, copy.deepcopy(config), lambda module: calibration.run())
    layers, ranges = {}, {}
    for name, place in names.items():
        module: Any = policy.module.get_submodule(place)
        layers[name] = _layer(module, request, shapes[name][1])
        if request.activation_bits is not None:
            ranges[name] = float(module.input_quantizer.amax)
    activations = None
    if request.activation_bits is not None:
        activations = ActivationRanges(request.activation_bits, "max", ranges)
    settings = {"algorithm": config["algorithm"], "quantizers": config["quant_cfg"][1:3]}
    return Quantized(layers, activations, settings)


def _config(request: BaselineRequest, places: list[str]) -> dict[str, Any]:
    """Return a configuration that quantizes the given modules only."""
    presets: Mapping[str, Any] = {
        "max": mtq.INT8_DEFAULT_CFG,
        "smoothquant": mtq.INT8_SMOOTHQUANT_CFG,
        "awq": mtq.INT4_AWQ_CFG,
    }
    weights: dict[str, Any] = {"num_bits": request.bits, "axis": 0}
    if request.group_size is not None:
        blocks = {-1: request.group_size, "type": "static"}
        weights = {"num_bits": request.bits, "block_sizes": blocks}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for place in places:
        entries.append({"quantizer_name": f"{place}.weight_quantizer", "cfg": weights})
        if request.activation_bits is not None:
            inputs = {"num_bits": request.activation_bits, "axis": None}
            entries.append({"quantizer_name": f"{place}.input_quantizer", "cfg": inputs})
    return {"quant_cfg": entries, "algorithm": presets[request.method]["algorithm"]}


@torch.no_grad()
def _layer(module: nn.Module, request: BaselineRequest, inputs: int) -> BaselineLayer:
    """Read codes and scales off a quantized module."""
    quantizer: Any = module.weight_quantizer
    weight: Any = module.weight
    rows = _numpy(quantizer(weight).flatten(1))
    # modelopt's largest code is 2^(bits-1) - 1; the lowest, one more, is used by clipping only.
    scales = _numpy(quantizer.amax.float().reshape(len(rows), -1)) / (2 ** (request.bits - 1) - 1)
    made = coded(rows, scales, request.bits, request.group_size, inputs, request.scale_bits)
    migrated = getattr(module.input_quantizer, "pre_quant_scale", None)
    if migrated is None:
        return BaselineLayer(made)
    factors = _numpy(migrated.float().flatten())[:inputs]
    return BaselineLayer(made, factors.astype(np.float16))


def _numpy(values: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.detach().float().numpy()
    return array

"""GPTQ by llm-compressor: its modifier and lifecycle, block after block; inputs rotated or not.

Its command takes models of `transformers`; its lifecycle takes any module. One lifecycle a block,
so that a block's Hessians are of inputs that the quantized blocks before it have made.
"""

import re
from typing import Any

import numpy as np
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.core import LifecycleCallbacks, create_session
from llmcompressor.modifiers.gptq import GPTQModifier

from qvla_export.baselines.baseline import BaselineLayer
from qvla_export.baselines.hadamard import rotation_size
from qvla_export.baselines.layer_adapter import blocks_of, coded, hand_over, module_names
from qvla_export.baselines.methods import BaselineRequest
from qvla_export.baselines.quantized import Calibration, Quantized
from qvla_export.policies.layers import layer_shapes, traced_layers


def quantize(calibration: Calibration) -> Quantized:
    """Quantize all layers by `GPTQModifier` with its defaults."""
    policy, request = calibration.policy, calibration.request
    shapes = layer_shapes(traced_layers(policy))
    # llm-compressor takes no convolutions.
    rotates = request.method == "hadamard-gptq"
    names = module_names(policy.module, hand_over(policy, request.group_size or 1, rotates))
    blocks = blocks_of(names)
    for number, members in enumerate(blocks.values(), 1):
        _quantize_block(calibration, [names[name] for name in members])
        calibration.on_progress(number, len(blocks))
    layers = {}
    for name, place in names.items():
        module: Any = policy.module.get_submodule(place)
        rows = module.weight.detach().flatten(1).float().numpy()
        scales = module.weight_scale.detach().float().numpy().reshape(len(rows), -1)
        if np.any(module.weight_zero_point.numpy()):
            raise AssertionError("symmetric quantization has zero points of 0")
        made = coded(
            rows, scales, request.bits, request.group_size, shapes[name][1], request.scale_bits
        )
        rotation = rotation_size(shapes[name][1]) if rotates else None
        layers[name] = BaselineLayer(made, rotation=rotation)
    modifier = _modifier(request, [])
    settings = {
        "block_size": modifier.block_size,
        "dampening_frac": modifier.dampening_frac,
        "actorder": "static",
        "calibration": "sequential, one block of the policy at a time",
    }
    return Quantized(layers, settings=settings)


def _quantize_block(calibration: Calibration, places: list[str]) -> None:
    module = calibration.policy.module
    with create_session() as session:
        session.initialize(model=module, recipe=_modifier(calibration.request, places))
        LifecycleCallbacks.calibration_start()
        calibration.run()
        LifecycleCallbacks.sequential_epoch_end(list(module.modules()))
        LifecycleCallbacks.calibration_end()
        session.finalize()


def _modifier(request: BaselineRequest, places: list[str]) -> Any:
    arguments = QuantizationArgs(
        num_bits=request.bits,
        type="int",
        symmetric=True,
        strategy="channel" if request.group_size is None else "group",
        group_size=request.group_size,
    )
    targets = [f"re:^{re.escape(place)}$" for place in places]
    scheme = QuantizationScheme(targets=targets, weights=arguments)
    return GPTQModifier(config_groups={"layers": scheme})

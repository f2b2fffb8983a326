"""Learned rounding and clipping by auto-round: its call for one block, block after block.

The call is the one llm-compressor uses: a block, its inputs in float and behind quantized blocks.
"""

from typing import Any

import numpy as np
import torch
from auto_round import AutoRound
from auto_round.schemes import QuantizationScheme
from torch import Tensor, nn
from transformers import PretrainedConfig

from qvla_export.baselines.baseline import BaselineLayer
from qvla_export.baselines.layer_adapter import blocks_of, coded, hand_over, module_names
from qvla_export.baselines.quantized import Calibration, Quantized
from qvla_export.policies.layers import layer_shapes, traced_layers
from qvla_export.shared.errors import QvlaError

# Positional and named arguments of one call.
_Inputs = tuple[tuple[Any, ...], dict[str, Any]]
# What auto-round calls one scale a channel.
_PER_CHANNEL = -1
_BATCH_SIZE = 8  # auto-round's default
# auto-round leaves convolutions in float, and layers of other numbers of inputs.
_MULTIPLE = 32


class _Blocks(nn.Module):
    """A list of one block, where auto-round looks for blocks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.layers[0](*arguments, **named)


class _Model(nn.Module):
    """A model of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.model = _Blocks(block)
        self.dtype = torch.float32
        self.name_or_path = ""
        self.config = PretrainedConfig()

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.model(*arguments, **named)


def quantize(calibration: Calibration) -> Quantized:
    """Quantize all layers by `AutoRound.quantize_block` with its defaults."""
    policy, request = calibration.policy, calibration.request
    shapes = layer_shapes(traced_layers(policy))
    names = module_names(policy.module, hand_over(policy, request.group_size or _MULTIPLE))
    blocks = blocks_of(names)
    recorded = _inputs_of(calibration, list(blocks))
    layers = {}
    for number, (block, members) in enumerate(blocks.items(), 1):
        _quantize_block(calibration, block, recorded.pop(block))
        for name in members:
            module: Any = policy.module.get_submodule(names[name])
            if not hasattr(module, "scale"):
                raise QvlaError(f"auto-round left {name} in float, {tuple(module.weight.shape)}")
            rows = module.weight.detach().flatten(1).float().numpy()
            scales = module.scale.detach().float().numpy().reshape(len(rows), -1)
            layers[name] = BaselineLayer(
                coded(
                    rows,
                    scales.astype(np.float32),
                    request.bits,
                    request.group_size,
                    shapes[name][1],
                    request.scale_bits,
                )
            )
        calibration.on_progress(number, len(blocks))
    return Quantized(
        layers,
        settings={
            "iters": request.iterations,
            "batch_size": _BATCH_SIZE,
            "sym": True,
            "calibration": "sequential, one block of the policy at a time; prompts padded",
        },
    )


def _quantize_block(calibration: Calibration, name: str, recorded: list[_Inputs]) -> None:
    """Learn one block's rounding; the module keeps the result."""
    policy, request = calibration.policy, calibration.request
    block = policy.module.get_submodule(name)
    behind = [arguments[0] for arguments, _ in _inputs_of(calibration, [name])[name]]
    rounder: Any = AutoRound(
        model=_Model(block),
        tokenizer="",  # as llm-compressor has it: no text is read
        scheme=QuantizationScheme.from_dict(
            {
                "bits": request.bits,
                "group_size": request.group_size or _PER_CHANNEL,
                "sym": True,
                "data_type": "int",
                "act_bits": 16,
            }
        ),
        iters=request.iterations,
        seed=request.seed,
        batch_size=_BATCH_SIZE,
        enable_torch_compile=False,
        low_gpu_mem_usage=False,
        device_map="cpu",
        amp=False,
    )
    rounder.configure_layer_config(enable_gguf_official_mixed=False)
    rounder.batch_dim = 0
    with torch.enable_grad():
        rounder.quantize_block(
            block=block,
            inputs=[(inputs,) for inputs in recorded],
            q_input=behind,
            device="cpu",
            auto_offload=False,
        )
    block.requires_grad_(False).eval()


@torch.no_grad()
def _inputs_of(calibration: Calibration, blocks: list[str]) -> dict[str, list[_Inputs]]:
    """Return what blocks are called with, an entry an observation; prompts padded to one length."""
    policy = calibration.policy
    found: dict[str, list[_Inputs]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, named: Any) -> None:
            whole = arguments[0].shape[0]
            found[name] = [
                (
                    tuple(_row(value, i, whole) for value in arguments),
                    {key: _row(value, i, whole) for key, value in named.items()},
                )
                for i in range(whole)
            ]

        return hook

    batch = policy.batch(calibration.observations)
    handles = [
        policy.module.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
        for name in blocks
    ]
    try:
        policy.normalized_actions(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _row(value: Any, index: int, whole: int) -> Any:
    """Return one observation's part of what all share or have a row each of."""
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == whole:
        return value[index : index + 1].clone()
    return value

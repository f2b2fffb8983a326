"""The parts of SmolVLA and the program that runs them: prefix once, a step of the flow each.

The expert is one graph for all steps, so that its weights are stored, loaded and quantized once.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qvla_export.policies.base import PolicyPart
from qvla_export.policies.prismatic.parts import PartModule
from qvla_export.policies.smolvla.blocks import SmolKeysValues
from qvla_export.policies.smolvla.module import SmolPrefix, SmolPrefixInputs, SmolVlaModule
from qvla_export.shared.processor import ProcessorSpec
from qvla_export.shared.program import PartRuns, Program

_PROMPT = {"input_ids": {1: "prompt"}}
# Any number of positions, larger than what the tracer would specialize on.
_EXAMPLE_TOKENS, _EXAMPLE_PLACES = 5, 9
_START = {"flow": "noise", "index": "first_index"}
_CARRY = {"next_flow": "flow", "next_index": "index"}


def whole_parts(module: SmolVlaModule, spec: ProcessorSpec) -> tuple[PolicyPart, ...]:
    """Return the prefix and a step of the flow."""
    return _prefix_part(module, spec), _step_part(module, spec)


def program_of(steps: int) -> Program:
    """Return the program: the prefix once, then a step as often as the flow has them."""
    flow = PartRuns("flow", ("step",), steps, _START, _CARRY if steps > 1 else {})
    return Program((*Program.straight(["prefix"]).runs, flow))


def _prefix_part(module: SmolVlaModule, spec: ProcessorSpec) -> PolicyPart:
    def run(pixel_values: Tensor, input_ids: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        prefix = module.prefix(SmolPrefixInputs(pixel_values, input_ids, state))
        caches = (tensor for pair in prefix.pairs for tensor in pair)
        # Of what the graph computes: a constant would be an output that no node makes.
        return *caches, prefix.length, prefix.length - prefix.length

    arch, device = module.arch, module.action_in_proj.weight.device
    images, side = len(spec.cameras), arch.image_side
    inputs = {
        "pixel_values": torch.zeros(1, 3 * images, side, side, device=device),
        "input_ids": torch.ones(1, _EXAMPLE_TOKENS, dtype=torch.int64, device=device),
        "state": torch.zeros(1, arch.state_width, device=device),
    }
    outputs: dict[str, Mapping[int, str]] = {
        **_caches(module, f"prompt+{images * arch.image_tokens + 1}"),
        "length": {},
        "first_index": {},
    }
    return PolicyPart("prefix", PartModule(module, run).eval(), inputs, outputs, _PROMPT)


def _step_part(module: SmolVlaModule, spec: ProcessorSpec) -> PolicyPart:
    def run(flow: Tensor, index: Tensor, length: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        pairs = [SmolKeysValues(*pair) for pair in zip(caches[::2], caches[1::2], strict=True)]
        flow = module.step(SmolPrefix(pairs, length, None), flow, index)
        return flow, index + 1, flow[:, :, : spec.action_dim]

    arch, device = module.arch, module.action_in_proj.weight.device
    dynamic = _caches(module, "places")
    shape = (1, arch.expert.kv_heads, _EXAMPLE_PLACES, arch.expert.head_dim)
    inputs = {
        "flow": torch.zeros(1, spec.horizon, arch.action_width, device=device),
        "index": torch.zeros(1, dtype=torch.int64, device=device),
        "length": torch.full((1,), _EXAMPLE_PLACES, dtype=torch.int64, device=device),
        # A tensor each: the tracer takes one object for one input.
        **{name: torch.zeros(shape, device=device) for name in dynamic},
    }
    outputs: dict[str, Mapping[int, str]] = {"next_flow": {}, "next_index": {}, "actions": {}}
    return PolicyPart("step", PartModule(module, run).eval(), inputs, outputs, dynamic)


def _caches(module: SmolVlaModule, places: str) -> dict[str, dict[int, str]]:
    """Return the names of what a step reads of the prefix -> axis of its positions -> `places`."""
    depth = module.arch.language.depth
    names = [f"{kind}_{i:02d}" for i in range(depth) for kind in ("keys", "values")]
    return {name: {2: places} for name in names}

"""The parts of a policy with a flow and the program that runs them: prefix once, a step each time.

The expert is one graph for all steps, so that its weights are stored, loaded and quantized once.
The time's sines are a table that a step is looked up in: a graph in 16 bits could not compute them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qvla_export.policies.base import PolicyPart
from qvla_export.policies.flow.attention import KeysValues
from qvla_export.policies.flow.module import FlowModule, Prefix, PrefixInputs
from qvla_export.policies.prismatic.parts import PartModule
from qvla_export.shared.processor import ProcessorSpec
from qvla_export.shared.program import PartRuns, Program

_PROMPT = {"input_ids": {1: "prompt"}}
# Any number of positions, larger than what the tracer would specialize on.
_EXAMPLE_TOKENS, _EXAMPLE_PLACES = 5, 9
# What names of a block's keys and values begin with.
_CACHES = ("keys_", "values_")
_START = {"flow": "noise", "index": "first_index"}
_CARRY = {"next_flow": "flow", "next_index": "index"}


def whole_parts(module: FlowModule, spec: ProcessorSpec) -> tuple[PolicyPart, ...]:
    """Return the prefix and a step of the flow."""
    return _prefix_part(module, spec), _step_part(module, spec)


def program_of(steps: int) -> Program:
    """Return the program: the prefix once, then a step as often as the flow has them."""
    flow = PartRuns("flow", ("step",), steps, _START, _CARRY if steps > 1 else {})
    return Program((*Program.straight(["prefix"]).runs, flow))


def _prefix_part(module: FlowModule, spec: ProcessorSpec) -> PolicyPart:
    names = _input_names(module, spec)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        prefix = module.prefix(PrefixInputs(**dict(zip(names, tensors, strict=True))))
        # Of what the graph computes: a constant would be an output that no node makes.
        first_index = prefix.length - prefix.length
        return *_handed_on(prefix), first_index

    arch, images = module.arch, len(spec.cameras)
    side, device = arch.image_side, module.action_in_proj.weight.device
    examples = {
        "pixel_values": torch.zeros(1, 3 * images, side, side, device=device),
        "input_ids": torch.ones(1, _EXAMPLE_TOKENS, dtype=torch.int64, device=device),
        "state": torch.zeros(1, arch.state_width, device=device),
        "image_mask": torch.ones(1, images, dtype=torch.bool, device=device),
    }
    inputs = {name: examples[name] for name in names}
    places = f"prompt+{images * arch.image_tokens + arch.prefix_reads_state}"
    outputs: dict[str, Mapping[int, str]] = {**_step_dynamic(module, spec, places)}
    outputs["first_index"] = {}
    return PolicyPart("prefix", PartModule(module, run).eval(), inputs, outputs, _PROMPT)


def _step_part(module: FlowModule, spec: ProcessorSpec) -> PolicyPart:
    arch = module.arch
    names = [*_step_dynamic(module, spec, "places")]

    def run(flow: Tensor, index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        prefix = _taken(dict(zip(names, tensors, strict=True)), arch.language.depth)
        flow = module.step(prefix, flow, index)
        return flow, index + 1, flow[:, :, : spec.action_dim]

    device, expert = module.action_in_proj.weight.device, arch.expert
    cache = (1, expert.kv_heads, _EXAMPLE_PLACES, expert.head_dim)
    examples = {
        # A tensor each: the tracer takes one object for one input.
        **{name: torch.zeros(cache, device=device) for name in names if name.startswith(_CACHES)},
        "length": torch.full((1,), _EXAMPLE_PLACES, dtype=torch.int64, device=device),
        "state_token": torch.zeros(1, 1, expert.width, device=device),
        "scores": torch.zeros(1, _EXAMPLE_PLACES, device=device),
    }
    inputs = {
        "flow": torch.zeros(1, spec.horizon, arch.action_width, device=device),
        "index": torch.zeros(1, dtype=torch.int64, device=device),
        **{name: examples[name] for name in names},
    }
    outputs: dict[str, Mapping[int, str]] = {"next_flow": {}, "next_index": {}, "actions": {}}
    dynamic = {n: sizes for n, sizes in _step_dynamic(module, spec, "places").items() if sizes}
    return PolicyPart("step", PartModule(module, run).eval(), inputs, outputs, dynamic)


def _input_names(module: FlowModule, spec: ProcessorSpec) -> list[str]:
    """Names of what the prefix reads: fields of `PrefixInputs` that this policy has."""
    names = ["pixel_values", "input_ids"]
    if module.arch.state_width:
        names.append("state")
    if spec.optional_cameras:
        names.append("image_mask")
    return names


def _step_dynamic(
    module: FlowModule, spec: ProcessorSpec, places: str
) -> dict[str, dict[int, str]]:
    """Return what a step reads of the prefix -> axis of its positions -> `places`."""
    axes: dict[str, dict[int, str]] = {}
    for index in range(module.arch.language.depth):
        axes |= {f"{kind}_{index:02d}": {2: places} for kind in ("keys", "values")}
    axes["length"] = {}
    if module.arch.expert_reads_state:
        axes["state_token"] = {}
    if spec.optional_cameras:
        axes["scores"] = {1: places}
    return axes


def _handed_on(prefix: Prefix) -> tuple[Tensor, ...]:
    """Return a prefix's tensors in the order of `_step_dynamic`."""
    rest = (prefix.length, prefix.state_token, prefix.scores)
    caches = (tensor for pair in prefix.pairs for tensor in pair)
    return *caches, *(tensor for tensor in rest if tensor is not None)


def _taken(tensors: Mapping[str, Tensor], depth: int) -> Prefix:
    """Return the prefix that `_handed_on` took apart."""
    pairs = [KeysValues(tensors[f"keys_{i:02d}"], tensors[f"values_{i:02d}"]) for i in range(depth)]
    return Prefix(pairs, tensors["length"], tensors.get("scores"), tensors.get("state_token"))

"""An OpenVLA-OFT policy cut into parts: both towers, projector, runs of decoder blocks, head.

A part is traced, quantized, built and run by itself, so that a policy that does not fit into
memory passes through it part by part.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qvla_export.policies.base import PolicyPart
from qvla_export.policies.oft.module import OftModule
from qvla_export.policies.prismatic.parts import (
    PartModule,
    device_of,
    example_patches,
    example_pixels,
    projector_part,
    tower_part,
)
from qvla_export.shared.processor import ProcessorSpec

_PROMPT = {"input_ids": {1: "prompt"}}


def whole_part(
    module: OftModule, spec: ProcessorSpec, act: Callable[[Tensor], Tensor]
) -> PolicyPart:
    """Return the policy as one part: pixels, prompt and state to actions.

    Args:
        module: the network.
        spec: shapes of its inputs.
        act: head's output -> normalized actions that the policy executes.
    """

    def run(pixel_values: Tensor, input_ids: Tensor, state: Tensor | None = None) -> Tensor:
        return act(module(pixel_values, input_ids, state))

    inputs = {**example_pixels(module, spec), **_text(module, spec)}
    return PolicyPart("policy", PartModule(module, run).eval(), inputs, {"actions": {}}, _PROMPT)


def cut_parts(
    module: OftModule,
    spec: ProcessorSpec,
    act: Callable[[Tensor], Tensor],
    layers_per_part: int,
) -> tuple[PolicyPart, ...]:
    """Return towers, projector, decoder parts of at most `layers_per_part` blocks, head."""
    blocks = len(module.language_model.model.layers)
    starts = range(0, blocks, layers_per_part)
    runs = [(first, min(first + layers_per_part, blocks)) for first in starts]
    names = [f"decoder_{i:02d}" for i in range(len(runs))] if len(runs) > 1 else ["decoder"]
    parts = [tower_part(module, spec, "dino"), tower_part(module, spec, "siglip")]
    parts += [projector_part(module, spec)]
    parts += [_decoder(module, spec, name, run) for name, run in zip(names, runs, strict=True)]
    return (*parts, _head(module, spec, act))


def _decoder(
    module: OftModule, spec: ProcessorSpec, name: str, blocks: tuple[int, int]
) -> PolicyPart:
    """Decoder `blocks` [first, last); the first part embeds, the last one has the final norm."""
    decoder, (first, last) = module.language_model, blocks
    name_out, sequence = f"hidden_{last:02d}", {1: _sequence(module, spec)}

    def run(hidden: Tensor) -> Tensor:
        output: Tensor = decoder(hidden, None, first, last)
        return output

    def run_first(patches: Tensor, input_ids: Tensor, state: Tensor | None = None) -> Tensor:
        return run(module.embed(patches, input_ids, state))

    if first == 0:
        inputs = {"patches": example_patches(module, spec), **_text(module, spec)}
        return PolicyPart(
            name, PartModule(module, run_first).eval(), inputs, {name_out: sequence}, _PROMPT
        )
    tokens = {f"hidden_{first:02d}": sequence}
    inputs = {f"hidden_{first:02d}": _hidden(module, spec)}
    return PolicyPart(name, PartModule(module, run).eval(), inputs, {name_out: sequence}, tokens)


def _head(module: OftModule, spec: ProcessorSpec, act: Callable[[Tensor], Tensor]) -> PolicyPart:
    source = f"hidden_{len(module.language_model.model.layers):02d}"

    def run(hidden: Tensor) -> Tensor:
        # Only lengths matter where no row is padded.
        return act(module.act(module.action_hidden(hidden, hidden[..., 0])))

    inputs = {source: _hidden(module, spec)}
    part = PartModule(module, run).eval()
    sizes = {source: {1: _sequence(module, spec)}}
    return PolicyPart("head", part, inputs, {"actions": {}}, sizes)


def _text(module: OftModule, spec: ProcessorSpec) -> dict[str, Tensor]:
    prompt = [[spec.bos_token_id] * 5 + [spec.suffix_token_id]]
    inputs = {"input_ids": torch.tensor(prompt, device=device_of(module))}
    if spec.state_dim:
        inputs["state"] = torch.zeros(1, spec.state_dim, device=device_of(module))
    return inputs


def _sequence(module: OftModule, spec: ProcessorSpec) -> str:
    """Length of the decoder's sequence: prompt, patches, state, action slots, stop."""
    fixed = example_patches(module, spec).shape[1] + bool(spec.state_dim) + module.arch.slots + 1
    return f"prompt+{fixed}"


def _hidden(module: OftModule, spec: ProcessorSpec) -> Tensor:
    """Any number of tokens, larger than what one would specialize on."""
    tokens = example_patches(module, spec).shape[1] + module.arch.slots + 8
    shape = (1, tokens, module.arch.llama.hidden_size)
    return torch.zeros(shape, device=device_of(module))

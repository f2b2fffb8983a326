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
from qvla_export.policies.prismatic.vision import Tower
from qvla_export.shared.processor import ProcessorSpec

_PROMPT = {"input_ids": {1: "prompt"}}
_LANGUAGE = "language"


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

    inputs = {**example_pixels(module, spec), **text_inputs(module, spec)}
    return PolicyPart("policy", PartModule(module, run).eval(), inputs, {"actions": {}}, _PROMPT)


def cut_parts(
    module: OftModule,
    spec: ProcessorSpec,
    act: Callable[[Tensor], Tensor],
    layers_per_part: int,
) -> tuple[PolicyPart, ...]:
    """Return towers, projector, decoder parts of at most `layers_per_part` blocks, head."""
    decoder = [
        _decoder(module, spec, name, run) for name, run in decoder_runs(module, layers_per_part)
    ]
    return (*vision_parts(module, spec), *decoder, _head(module, spec, act))


def vision_parts(module: OftModule, spec: ProcessorSpec) -> list[PolicyPart]:
    """Return towers and projector; with FiLM also what the instruction tells the towers."""
    if module.film is None:
        towers = [tower_part(module, spec, "dino"), tower_part(module, spec, "siglip")]
    else:
        towers = [_language(module, spec)]
        towers += [_filmed_tower(module, spec, "dino"), _filmed_tower(module, spec, "siglip")]
    return [*towers, projector_part(module, spec)]


def decoder_runs(module: OftModule, layers_per_part: int) -> list[tuple[str, tuple[int, int]]]:
    """Return names of decoder parts, and the blocks [first, last) of each."""
    blocks = len(module.language_model.model.layers)
    starts = range(0, blocks, layers_per_part)
    runs = [(first, min(first + layers_per_part, blocks)) for first in starts]
    if len(runs) == 1:
        return [("decoder", runs[0])]
    return [(f"decoder_{number:02d}", run) for number, run in enumerate(runs)]


def _language(module: OftModule, spec: ProcessorSpec) -> PolicyPart:
    """Mean embedding of the prompt."""

    def run(input_ids: Tensor) -> Tensor:
        return module.language(module.text(input_ids))

    ids = {"input_ids": text_inputs(module, spec)["input_ids"]}
    return PolicyPart("language", PartModule(module, run).eval(), ids, {_LANGUAGE: {}}, _PROMPT)


def _filmed_tower(module: OftModule, spec: ProcessorSpec, name: Tower) -> PolicyPart:
    """One vision tower: pixels to its features, as the instruction has it."""
    film, images = module.film, len(spec.cameras)
    assert film is not None

    def run(pixel_values: Tensor, language: Tensor) -> Tensor:
        modulate = film.modulation(language, images)
        return module.vision_backbone.features(pixel_values, name, modulate)

    width = module.arch.llama.hidden_size
    inputs = example_pixels(module, spec)
    inputs[_LANGUAGE] = torch.zeros(1, width, device=device_of(module))
    return PolicyPart(name, PartModule(module, run).eval(), inputs, {f"{name}_features": {}}, {})


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
        inputs = {"patches": example_patches(module, spec), **text_inputs(module, spec)}
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


def text_inputs(module: OftModule, spec: ProcessorSpec) -> dict[str, Tensor]:
    """Return model inputs `input_ids`, and `state` where there is one, as examples."""
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

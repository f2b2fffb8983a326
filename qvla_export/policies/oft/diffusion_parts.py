"""Parts of a policy with a diffusion head: what is seen, once; a step of it, as often as there are.

A step is a pass of all actions through the decoder, which attends in both directions: what it
computes of the prompt depends on the noise, so that only embeddings are handed on. The time of a
step is a table that it is looked up in.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qvla_export.policies.base import PolicyPart
from qvla_export.policies.oft.module import OftModule
from qvla_export.policies.oft.parts import decoder_runs, text_inputs, vision_parts
from qvla_export.policies.prismatic.parts import (
    PartModule,
    device_of,
    example_patches,
    example_pixels,
)
from qvla_export.shared.processor import ProcessorSpec
from qvla_export.shared.program import PartRuns, Program

_PROMPT = {"input_ids": {1: "prompt"}}
# Any number of tokens, larger than what the tracer would specialize on.
_EXAMPLE_TOKENS = 9
_TEXT = {"text": {1: "prompt+1"}}
# Parts that run before the steps; the others are a step's.
_BEFORE = ("language", "dino", "siglip", "projector", "prefix")
_START = {"noisy": "noise", "index": "first_index"}
_CARRY = {"actions": "noisy", "next_index": "index"}
# Context, text, number of the first step.
_Seen = tuple[Tensor, Tensor, Tensor]


def whole_parts(module: OftModule, spec: ProcessorSpec) -> tuple[PolicyPart, ...]:
    """Return what is seen, and a step."""

    def run(pixel_values: Tensor, input_ids: Tensor, state: Tensor | None = None) -> _Seen:
        text = module.text(input_ids)
        patches = module.seen(pixel_values, module.language(text))
        return _seen(module, patches, text, state)

    def step(context: Tensor, text: Tensor, noisy: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return module.denoise(context, text, noisy, index), index + 1

    prefix = _prefix(module, spec, run, example_pixels(module, spec))
    part = PartModule(module, step).eval()
    outputs: dict[str, Mapping[int, str]] = {"actions": {}, "next_index": {}}
    return prefix, PolicyPart("step", part, _step_inputs(module, spec), outputs, _TEXT)


def cut_parts(
    module: OftModule, spec: ProcessorSpec, layers_per_part: int
) -> tuple[PolicyPart, ...]:
    """Return towers, projector, embeddings; of a step its sequence, decoder parts and its end."""

    def run(patches: Tensor, input_ids: Tensor, state: Tensor | None = None) -> _Seen:
        return _seen(module, patches, module.text(input_ids), state)

    prefix = _prefix(module, spec, run, {"patches": example_patches(module, spec)})
    decoder = [_decoder(module, spec, *run) for run in decoder_runs(module, layers_per_part)]
    steps = (_sequence(module, spec), *decoder, _end(module, spec))
    return (*vision_parts(module, spec), prefix, *steps)


def program_of(parts: Sequence[PolicyPart], steps: int) -> Program:
    """Return the program of parts from `whole_parts` or `cut_parts`."""
    before = [part.name for part in parts if part.name in _BEFORE]
    after = tuple(part.name for part in parts if part.name not in _BEFORE)
    denoise = PartRuns("denoise", after, steps, _START, _CARRY if steps > 1 else {})
    return Program((*Program.straight(before).runs, denoise))


def _seen(module: OftModule, patches: Tensor, text: Tensor, state: Tensor | None) -> _Seen:
    # Of what the graph computes: a constant would be an output that no node makes.
    first_index = torch.zeros_like(text[:, 0, 0], dtype=torch.int64)
    return module.context(patches, state), text, first_index


def _prefix(
    module: OftModule,
    spec: ProcessorSpec,
    run: Callable[..., _Seen],
    images: Mapping[str, Tensor],
) -> PolicyPart:
    """Embed what stays the same for all steps."""
    inputs = {**images, **text_inputs(module, spec)}
    outputs: dict[str, Mapping[int, str]] = {"context": {}, **_TEXT, "first_index": {}}
    return PolicyPart("prefix", PartModule(module, run).eval(), inputs, outputs, _PROMPT)


def _sequence(module: OftModule, spec: ProcessorSpec) -> PolicyPart:
    """Embed a noisy chunk and the step's time, between context and prompt."""

    def run(context: Tensor, text: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        context, slots = module.noisy_slots(context, noisy, index)
        return module.sequence(context, text, slots)

    outputs = {"hidden_00": {1: _length(module, spec)}}
    part = PartModule(module, run).eval()
    return PolicyPart("sequence", part, _step_inputs(module, spec), outputs, _TEXT)


def _decoder(
    module: OftModule, spec: ProcessorSpec, name: str, blocks: tuple[int, int]
) -> PolicyPart:
    """Decoder `blocks` [first, last); the last part has the final norm."""
    first, last = blocks

    def run(hidden: Tensor) -> Tensor:
        output: Tensor = module.language_model(hidden, None, first, last)
        return output

    source, sizes = f"hidden_{first:02d}", {1: _length(module, spec)}
    part, inputs = PartModule(module, run).eval(), {source: _hidden(module, spec)}
    return PolicyPart(name, part, inputs, {f"hidden_{last:02d}": sizes}, {source: sizes})


def _end(module: OftModule, spec: ProcessorSpec) -> PolicyPart:
    """Predict the noise, and take the step."""

    def run(hidden: Tensor, noisy: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        # Only lengths matter where no row is padded.
        states = module.action_hidden(hidden, hidden[..., 0])
        return module.after_step(states, noisy, index), index + 1

    source = f"hidden_{len(module.language_model.model.layers):02d}"
    examples = _step_inputs(module, spec)
    inputs = {source: _hidden(module, spec), **{n: examples[n] for n in ("noisy", "index")}}
    outputs: dict[str, Mapping[int, str]] = {"actions": {}, "next_index": {}}
    sizes = {source: {1: _length(module, spec)}}
    return PolicyPart("head", PartModule(module, run).eval(), inputs, outputs, sizes)


def _step_inputs(module: OftModule, spec: ProcessorSpec) -> dict[str, Tensor]:
    device, width = device_of(module), int(module.arch.llama.hidden_size)
    places = example_patches(module, spec).shape[1] + bool(spec.state_dim)
    return {
        "context": torch.zeros(1, places, width, device=device),
        "text": torch.zeros(1, _EXAMPLE_TOKENS, width, device=device),
        "noisy": torch.zeros(1, spec.horizon, spec.action_dim, device=device),
        "index": torch.zeros(1, dtype=torch.int64, device=device),
    }


def _length(module: OftModule, spec: ProcessorSpec) -> str:
    """Length of the decoder's sequence: prompt, patches, state, time, action slots, stop."""
    fixed = example_patches(module, spec).shape[1] + bool(spec.state_dim) + module.arch.slots + 2
    return f"prompt+{fixed}"


def _hidden(module: OftModule, spec: ProcessorSpec) -> Tensor:
    places = example_patches(module, spec).shape[1] + module.arch.slots + _EXAMPLE_TOKENS
    return torch.zeros(1, places, int(module.arch.llama.hidden_size), device=device_of(module))

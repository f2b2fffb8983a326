"""OpenVLA's parts and the program that runs them: prefix once, decoder once a token.

The decoder is one graph for the whole prompt and for a token after it, so that its weights are
stored, loaded and quantized once. The prefix hands on what stays the same for all tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qvla_export.policies.base import PolicyPart
from qvla_export.policies.cached_decoder import LayerCache
from qvla_export.policies.openvla.architecture import OpenVlaArchitecture
from qvla_export.policies.openvla.module import OpenVlaModule
from qvla_export.policies.prismatic.parts import (
    PartModule,
    device_of,
    example_patches,
    example_pixels,
    projector_part,
    tower_part,
)
from qvla_export.shared.processor import ProcessorSpec
from qvla_export.shared.program import PartRuns, Program

_PROMPT = {"input_ids": {1: "prompt"}}
# Sizes that differ between the pass over the prompt and those after it, and the cache's.
_ROWS, _ROOM = {1: "rows"}, {2: "room"}
# What the prefix hands on -> input of the decoder that it is at first.
_START = {"sequence": "hidden", "no_actions": "so_far", "prompt_length": "length"}
# What a pass puts out -> input of the next.
_CARRY = {"next_hidden": "hidden", "actions": "so_far", "next_length": "length"}
# Any number of positions, larger than what the tracer would specialize on.
_EXAMPLE_ROWS, _EXAMPLE_ROOM = 5, 9


def whole_parts(module: OpenVlaModule, spec: ProcessorSpec) -> tuple[PolicyPart, ...]:
    """Return the prefix and the decoder with its head."""

    def run(pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, ...]:
        return _begin(module, module.patches(pixel_values), input_ids)

    inputs = {**example_pixels(module, spec), **_ids(module, spec)}
    part = PartModule(module, run).eval()
    prefix = PolicyPart("prefix", part, inputs, _prefix_outputs(module, spec), _PROMPT)
    return prefix, _decoder(module, "decoder", (0, _depth(module)))


def cut_parts(
    module: OpenVlaModule, spec: ProcessorSpec, layers_per_part: int
) -> tuple[PolicyPart, ...]:
    """Return towers, projector, prefix, decoder parts of at most `layers_per_part` blocks."""

    def run(patches: Tensor, input_ids: Tensor) -> tuple[Tensor, ...]:
        return _begin(module, patches, input_ids)

    inputs = {"patches": example_patches(module, spec), **_ids(module, spec)}
    part = PartModule(module, run).eval()
    prefix = PolicyPart("prefix", part, inputs, _prefix_outputs(module, spec), _PROMPT)
    depth = _depth(module)
    starts = range(0, depth, layers_per_part)
    runs = [(first, min(first + layers_per_part, depth)) for first in starts]
    names = [f"decoder_{i:02d}" for i in range(len(runs))] if len(runs) > 1 else ["decoder"]
    towers = (tower_part(module, spec, "dino"), tower_part(module, spec, "siglip"))
    decoder = [_decoder(module, name, run) for name, run in zip(names, runs, strict=True)]
    return (*towers, projector_part(module, spec), prefix, *decoder)


def program_of(parts: Sequence[PolicyPart], arch: OpenVlaArchitecture) -> Program:
    """Return the program of parts from `whole_parts` or `cut_parts`."""
    decoder = tuple(part.name for part in parts if part.name.startswith("decoder"))
    before = [part.name for part in parts if part.name not in decoder]
    caches = [n for part in parts for n in part.outputs if n.startswith(("next_keys", "next_val"))]
    carry = {**_CARRY, **{name: name.removeprefix("next_") for name in caches}}
    start = {name: source for source, name in _START.items()}
    start |= {name.removeprefix("next_"): "empty" for name in caches}
    prefill = PartRuns("prefill", decoder, start=start)
    again = {name: source for source, name in carry.items()}
    decode = PartRuns("decode", decoder, arch.action_dim - 1, again, carry)
    if arch.action_dim == 1:
        return Program((*Program.straight(before).runs, prefill))
    if arch.action_dim == 2:  # one pass carries nothing on
        decode = PartRuns("decode", decoder, 1, again)
    return Program((*Program.straight(before).runs, prefill, decode))


def _begin(module: OpenVlaModule, patches: Tensor, input_ids: Tensor) -> tuple[Tensor, ...]:
    """Return the sequence, its length, an empty cache, token embeddings, actions so far."""
    arch = module.arch
    sequence, length = module.embed(patches, input_ids)
    room = sequence.shape[1] + arch.action_dim - 1
    empty = module.language_model.empty_cache(sequence, room).keys
    every = torch.arange(arch.action_tokens, device=input_ids.device)
    # Of what the graph computes: a constant would be an output that no node makes.
    nothing = empty[0, 0, 0, 0].expand(1, 1, arch.action_dim)
    return sequence, length, empty, module.embed_tokens(every), nothing


def _prefix_outputs(module: OpenVlaModule, spec: ProcessorSpec) -> dict[str, Mapping[int, str]]:
    patches = example_patches(module, spec).shape[1]
    return {
        "sequence": {1: f"prompt+{patches}"},
        "prompt_length": {},
        "empty": {2: f"prompt+{patches + module.arch.action_dim - 1}"},
        "token_embeddings": {},
        "no_actions": {},
    }


def _decoder(module: OpenVlaModule, name: str, blocks: tuple[int, int]) -> PolicyPart:
    """Decoder blocks [first, last) on the newest positions; the last ones choose the token."""
    decoder, (first, last) = module.language_model, blocks
    ends = last == _depth(module)
    source = "hidden" if first == 0 else f"hidden_{first:02d}"
    cached = [f"{kind}_{i:02d}" for i in range(first, last) for kind in ("keys", "values")]

    def run(hidden: Tensor, length: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(rest[0 : len(cached) : 2], rest[1 : len(cached) : 2], strict=True)
        past = [LayerCache(keys, values) for keys, values in pairs]
        hidden, caches = decoder.blocks(hidden, length, past, first, last)
        kept = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
        if not ends:
            return hidden, *kept
        return *_choose(module, hidden, length, *rest[len(cached) :]), *kept

    device, width = device_of(module), module.arch.llama.hidden_size
    rows = torch.zeros(1, _EXAMPLE_ROWS, width, device=device)
    inputs = {
        source: rows,
        "length": torch.full((1,), _EXAMPLE_ROWS, dtype=torch.int64, device=device),
        # A tensor each: the tracer takes one object for one input.
        **{name: decoder.empty_cache(rows, _EXAMPLE_ROOM).keys for name in cached},
    }
    dynamic: dict[str, Mapping[int, str]] = {source: _ROWS, **dict.fromkeys(cached, _ROOM)}
    outputs: dict[str, Mapping[int, str]] = {f"hidden_{last:02d}": _ROWS}
    if ends:
        tokens = (module.arch.action_tokens, width)
        inputs["token_embeddings"] = torch.zeros(tokens, device=device)
        inputs["so_far"] = torch.zeros(1, 1, module.arch.action_dim, device=device)
        outputs = {"next_hidden": {}, "next_length": {}, "actions": {}}
    outputs |= {f"next_{name}": _ROOM for name in cached}
    return PolicyPart(name, PartModule(module, run).eval(), inputs, outputs, dynamic)


def _choose(
    module: OpenVlaModule, hidden: Tensor, length: Tensor, embeddings: Tensor, so_far: Tensor
) -> tuple[Tensor, ...]:
    """Return the chosen token's embedding, the length with it, and the actions with its bin's."""
    token = module.language_model.logits(hidden[:, -1:]).argmax(dim=-1)
    center = module.token_centers[token][:, None]
    return embeddings[token], length + 1, torch.cat([so_far[:, :, 1:], center], dim=2)


def _ids(module: OpenVlaModule, spec: ProcessorSpec) -> dict[str, Tensor]:
    prompt = [[spec.bos_token_id] * 5 + [spec.suffix_token_id]]
    return {"input_ids": torch.tensor(prompt, device=device_of(module))}


def _depth(module: OpenVlaModule) -> int:
    return len(module.language_model.model.layers)

"""Parts of a policy that decodes tokens, and the runs of them: prefix once, decoder once a token.

The decoder is one graph for the whole prompt and for a token after it, so that its weights are
stored, loaded and quantized once. The prefix hands on what stays the same for all tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qvla_export.policies.base import PolicyPart
from qvla_export.policies.cached_decoder import LayerCache
from qvla_export.policies.prismatic.decoding import TokenModule
from qvla_export.policies.prismatic.parts import (
    PartModule,
    device_of,
    example_patches,
    example_pixels,
    projector_part,
    tower_part,
)
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.processor import ProcessorSpec
from qvla_export.shared.program import PartRuns, Program

# Hidden states after the final norm, of the positions of a pass.
STATES = "states"
_PROMPT = {"input_ids": {1: "prompt"}}
# Sizes that differ between the pass over the prompt and those after it, and the cache's.
_ROWS, _ROOM = {1: "rows"}, {2: "room"}
# Any number of positions, larger than what the tracer would specialize on.
_EXAMPLE_ROWS, _EXAMPLE_ROOM = 5, 9
# What tokens are drawn by: those of the next one stand first, and those used go to the end.
_DRAWS, _NEXT_DRAWS = "draws", "next_draws"


@dataclass(frozen=True)
class TokenParts:
    """What the parts are of: a network, its inputs, and what is kept of every token."""

    module: TokenModule
    spec: ProcessorSpec
    # Name of what is kept: an output of every pass.
    result: str
    # Its shape, in which the newest token's stands last.
    shape: tuple[int, ...]
    # (result so far, last position's state [1, 1, D], token [1, 1]) -> result.
    extend: Callable[[Tensor, Tensor, Tensor], Tensor]
    # Whether a pass puts out the states of all its positions, as `STATES`.
    with_states: bool = False

    def whole(self) -> tuple[PolicyPart, ...]:
        """Return the prefix and the decoder with its output layer."""

        def run(pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, ...]:
            return self._begin(self.module.patches(pixel_values), input_ids)

        prefix = self._prefix(run, example_pixels(self.module, self.spec))
        return prefix, self._decoder("decoder", (0, self._depth))

    def cut(self, layers_per_part: int) -> tuple[PolicyPart, ...]:
        """Return towers, projector, prefix, decoder parts of at most `layers_per_part` blocks."""
        module, spec, depth = self.module, self.spec, self._depth
        starts = range(0, depth, layers_per_part)
        runs = [(first, min(first + layers_per_part, depth)) for first in starts]
        names = [f"decoder_{i:02d}" for i in range(len(runs))] if len(runs) > 1 else ["decoder"]
        return (
            tower_part(module, spec, "dino"),
            tower_part(module, spec, "siglip"),
            projector_part(module, spec),
            self._prefix(self._begin, {"patches": example_patches(module, spec)}),
            *(self._decoder(name, run) for name, run in zip(names, runs, strict=True)),
        )

    def parts(self, layers_per_part: int | None) -> tuple[PolicyPart, ...]:
        """Return `whole` parts for None, else `cut` ones.

        Raises:
            CheckpointError: the number is below 1.
        """
        if layers_per_part is None:
            return self.whole()
        if layers_per_part < 1:
            raise CheckpointError(f"layers_per_part must be at least 1, got {layers_per_part}")
        return self.cut(layers_per_part)

    def runs(self, parts: Sequence[PolicyPart]) -> tuple[PartRuns, ...]:
        """Return each part before the decoder, "prefill" over the prompt, "decode" after it."""
        steps = self.module.vocabulary.steps
        decoder = tuple(part.name for part in parts if part.name.startswith("decoder"))
        before = Program.straight(part.name for part in parts if part.name not in decoder).runs
        caches = [
            n for part in parts for n in part.outputs if n.startswith(("next_keys", "next_val"))
        ]
        carry = {"next_hidden": "hidden", self.result: "so_far", "next_length": "length"}
        carry |= {name: name.removeprefix("next_") for name in caches}
        start = {"hidden": "sequence", "so_far": f"no_{self.result}", "length": "prompt_length"}
        start |= {name.removeprefix("next_"): "empty" for name in caches}
        noise = self.spec.noise
        if noise is not None:
            start[_DRAWS], carry[_NEXT_DRAWS] = noise.name, _DRAWS
        prefill = PartRuns("prefill", decoder, start=start)
        if steps == 1:
            return *before, prefill
        again = {name: source for source, name in carry.items()}
        # One pass carries nothing on.
        decode = PartRuns("decode", decoder, steps - 1, again, carry if steps > 2 else {})
        return *before, prefill, decode

    @property
    def _depth(self) -> int:
        return len(self.module.language_model.model.layers)

    def _begin(self, patches: Tensor, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Return the sequence, its length, an empty cache, token embeddings, no result yet."""
        module, vocabulary = self.module, self.module.vocabulary
        sequence, length = module.embed(patches, input_ids)
        room = sequence.shape[1] + vocabulary.steps - 1
        empty = module.language_model.empty_cache(sequence, room).keys
        every = torch.arange(vocabulary.tokens, device=input_ids.device)
        # Of what the graph computes: a constant would be an output that no node makes.
        nothing = empty[0, 0, 0, 0].expand(self.shape)
        return sequence, length, empty, module.embed_tokens(every), nothing

    def _prefix(
        self, run: Callable[..., tuple[Tensor, ...]], images: Mapping[str, Tensor]
    ) -> PolicyPart:
        """Embed the prompt behind what is made of the images."""
        prompt = [[self.spec.bos_token_id] * 5 + [self.spec.suffix_token_id]]
        ids = torch.tensor(prompt, device=device_of(self.module))
        patches = example_patches(self.module, self.spec).shape[1]
        outputs: dict[str, Mapping[int, str]] = {
            "sequence": {1: f"prompt+{patches}"},
            "prompt_length": {},
            "empty": {2: f"prompt+{patches + self.module.vocabulary.steps - 1}"},
            "token_embeddings": {},
            f"no_{self.result}": {},
        }
        part = PartModule(self.module, run).eval()
        return PolicyPart("prefix", part, {**images, "input_ids": ids}, outputs, _PROMPT)

    def _decoder(self, name: str, blocks: tuple[int, int]) -> PolicyPart:
        """Decoder blocks [first, last) on the newest positions; the last ones choose the token."""
        module, (first, last) = self.module, blocks
        decoder, ends = module.language_model, last == self._depth
        source = "hidden" if first == 0 else f"hidden_{first:02d}"
        cached = [f"{kind}_{i:02d}" for i in range(first, last) for kind in ("keys", "values")]

        def run(hidden: Tensor, length: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            pairs = zip(rest[0 : len(cached) : 2], rest[1 : len(cached) : 2], strict=True)
            past = [LayerCache(keys, values) for keys, values in pairs]
            hidden, caches = decoder.blocks(hidden, length, past, first, last)
            kept = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
            if not ends:
                return hidden, *kept
            return *self._choose(hidden, length, rest[len(cached) :]), *kept

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
            inputs["token_embeddings"] = torch.zeros(module.vocabulary.tokens, width, device=device)
            inputs["so_far"] = torch.zeros(self.shape, device=device)
            outputs = {"next_hidden": {}, "next_length": {}, self.result: {}}
            if (noise := self.spec.noise) is not None:
                inputs[_DRAWS] = torch.zeros(1, *noise.shape, device=device)
                outputs[_NEXT_DRAWS] = {}
            outputs |= {STATES: _ROWS} if self.with_states else {}
        outputs |= {f"next_{name}": _ROOM for name in cached}
        return PolicyPart(name, PartModule(module, run).eval(), inputs, outputs, dynamic)

    def _choose(
        self, hidden: Tensor, length: Tensor, rest: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Return the chosen token's embedding, the length with it, the result with it, and draws.

        Args:
            hidden: of the newest positions.
            length: with them.
            rest: embeddings of the tokens, the result so far, and what tokens are drawn by.
        """
        decoder, (embeddings, so_far, *draws) = self.module.language_model, rest
        states = decoder.model.norm(hidden if self.with_states else hidden[:, -1:])
        numbers = draws[0][:, :1] if draws else None
        token = self.module.choose(decoder.lm_head(states[:, -1:]), numbers)
        result = self.extend(so_far, states[:, -1:], token)
        later = [torch.cat([d[:, 1:], d[:, :1]], dim=1) for d in draws]
        chosen = (embeddings[token], length + 1, result, *later)
        return (*chosen, states) if self.with_states else chosen

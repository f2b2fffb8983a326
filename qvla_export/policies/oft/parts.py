"""An OpenVLA-OFT policy cut into parts: both towers, projector, runs of decoder blocks, head.

A part is traced, quantized, built and run by itself, so that a policy that does not fit into
memory passes through it part by part.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from qvla_export.policies.base import PolicyPart
from qvla_export.policies.oft.module import OftModule
from qvla_export.shared.processor import ProcessorSpec

_PROMPT = {"input_ids": {1: "prompt"}}


class _PartModule(nn.Module):
    """A function of the network's modules; parameters keep their names behind "module."."""

    def __init__(self, module: OftModule, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the part."""
        return self._function(*inputs)


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

    inputs = {**_pixels(module, spec), **_text(module, spec)}
    return PolicyPart("policy", _PartModule(module, run).eval(), inputs, "actions", _PROMPT)


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
    parts = [_tower(module, spec, "dino"), _tower(module, spec, "siglip")]
    parts += [_projector(module, spec)]
    parts += [_decoder(module, spec, name, run) for name, run in zip(names, runs, strict=True)]
    return (*parts, _head(module, spec, act))


def _tower(module: OftModule, spec: ProcessorSpec, name: Literal["dino", "siglip"]) -> PolicyPart:
    def run(pixel_values: Tensor) -> Tensor:
        return module.vision_backbone.features(pixel_values, name)

    part = _PartModule(module, run).eval()
    return PolicyPart(name, part, _pixels(module, spec), f"{name}_features", {})


def _projector(module: OftModule, spec: ProcessorSpec) -> PolicyPart:
    def run(dino_features: Tensor, siglip_features: Tensor) -> Tensor:
        patches: Tensor = module.projector(torch.cat([dino_features, siglip_features], dim=-1))
        return patches

    tokens = _patches(module, spec).shape[1]
    towers = (("dino", module.arch.dino), ("siglip", module.arch.siglip))
    inputs = {
        f"{name}_features": torch.zeros(1, tokens, tower.hidden_size, device=_device(module))
        for name, tower in towers
    }
    return PolicyPart("projector", _PartModule(module, run).eval(), inputs, "patches", {})


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
        inputs = {"patches": _patches(module, spec), **_text(module, spec)}
        return PolicyPart(
            name, _PartModule(module, run_first).eval(), inputs, name_out, _PROMPT, sequence
        )
    tokens = {f"hidden_{first:02d}": sequence}
    inputs = {f"hidden_{first:02d}": _hidden(module, spec)}
    return PolicyPart(name, _PartModule(module, run).eval(), inputs, name_out, tokens, sequence)


def _head(module: OftModule, spec: ProcessorSpec, act: Callable[[Tensor], Tensor]) -> PolicyPart:
    source = f"hidden_{len(module.language_model.model.layers):02d}"

    def run(hidden: Tensor) -> Tensor:
        # Only lengths matter where no row is padded.
        return act(module.act(module.action_hidden(hidden, hidden[..., 0])))

    inputs = {source: _hidden(module, spec)}
    part = _PartModule(module, run).eval()
    sizes = {source: {1: _sequence(module, spec)}}
    return PolicyPart("head", part, inputs, "actions", sizes)


def _device(module: OftModule) -> torch.device:
    return module.projector.fc1.weight.device


def _pixels(module: OftModule, spec: ProcessorSpec) -> dict[str, Tensor]:
    side = spec.image.size
    shape = (1, 6 * len(spec.cameras), side, side)
    return {"pixel_values": torch.zeros(shape, device=_device(module))}


def _text(module: OftModule, spec: ProcessorSpec) -> dict[str, Tensor]:
    prompt = [[spec.bos_token_id] * 5 + [spec.suffix_token_id]]
    inputs = {"input_ids": torch.tensor(prompt, device=_device(module))}
    if spec.state_dim:
        inputs["state"] = torch.zeros(1, spec.state_dim, device=_device(module))
    return inputs


def _patches(module: OftModule, spec: ProcessorSpec) -> Tensor:
    patch_size = int(module.arch.dino.patch_size)  # type: ignore[arg-type]  # ours is square
    patches = len(spec.cameras) * (spec.image.size // patch_size) ** 2
    shape = (1, patches, module.arch.llama.hidden_size)
    return torch.zeros(shape, device=_device(module))


def _sequence(module: OftModule, spec: ProcessorSpec) -> str:
    """Length of the decoder's sequence: prompt, patches, state, action slots, stop."""
    fixed = _patches(module, spec).shape[1] + bool(spec.state_dim) + module.arch.slots + 1
    return f"prompt+{fixed}"


def _hidden(module: OftModule, spec: ProcessorSpec) -> Tensor:
    """Any number of tokens, larger than what one would specialize on."""
    tokens = _patches(module, spec).shape[1] + module.arch.slots + 8
    shape = (1, tokens, module.arch.llama.hidden_size)
    return torch.zeros(shape, device=_device(module))

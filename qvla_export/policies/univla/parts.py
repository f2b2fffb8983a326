"""UniVLA's parts and the program that runs them.

The prompt's pass gives the states that `visual` pools once; states of tokens gather over all
passes, and `action` decodes both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qvla_export.policies.base import PolicyPart
from qvla_export.policies.prismatic.decoding_parts import STATES, TokenParts
from qvla_export.policies.prismatic.parts import PartModule, device_of, example_patches
from qvla_export.policies.univla.module import UniVlaModule
from qvla_export.shared.part import CHOSEN_TOKENS
from qvla_export.shared.processor import ProcessorSpec
from qvla_export.shared.program import PartRuns, Program

_LATENTS, _VISUAL = "latents", "visual"


def latent_parts(module: UniVlaModule, spec: ProcessorSpec) -> TokenParts:
    """Return what makes the parts that decode latent tokens, whole or cut."""

    repeated = spec.history is not None

    def extend(so_far: Tensor, state: Tensor, token: Tensor) -> Tensor:
        # A token that the next prompt repeats stands behind the state that predicted it.
        newest = torch.cat([state, token[:, :, None].to(state.dtype)], dim=2) if repeated else state
        return torch.cat([so_far[:, 1:], newest], dim=1)

    shape = (1, module.arch.latent_tokens, int(module.arch.llama.hidden_size) + repeated)
    return TokenParts(module, spec, _LATENTS, shape, extend, with_states=True)


def action_parts(module: UniVlaModule, spec: ProcessorSpec) -> tuple[PolicyPart, PolicyPart]:
    """Return what pools the image's states, and what decodes latent tokens with it."""
    arch, device, repeated = module.arch, device_of(module), spec.history is not None
    patches, width = example_patches(module, spec).shape[1], int(arch.llama.hidden_size)
    states = torch.zeros(1, patches + 6, width, device=device)
    latents = torch.zeros(1, arch.latent_tokens, width + repeated, device=device)
    visual = torch.zeros(1, arch.decoder.width, device=device)

    def act(latents: Tensor, visual: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        actions: Tensor = module.action_decoder(latents[..., :width], visual)
        return (actions, latents[..., width]) if repeated else actions

    outputs: dict[str, dict[int, str]] = {"actions": {}}
    if repeated:
        outputs[CHOSEN_TOKENS] = {}
    pool, decode = PartModule(module, module.pooled).eval(), PartModule(module, act).eval()
    return (
        PolicyPart(
            _VISUAL, pool, {STATES: states}, {_VISUAL: {}}, {STATES: {1: f"prompt+{patches}"}}
        ),
        PolicyPart("action", decode, {_LATENTS: latents, _VISUAL: visual}, outputs, {}),
    )


def program_of(latent: TokenParts, parts: Sequence[PolicyPart]) -> Program:
    """Return the program of parts from `latent_parts` and `action_parts`."""
    last = (_VISUAL, "action")
    runs = latent.runs([part for part in parts if part.name not in last])
    prefill = next(number for number, run in enumerate(runs) if run.name == "prefill")
    visual, action = (PartRuns(name, (name,)) for name in last)
    return Program((*runs[: prefill + 1], visual, *runs[prefill + 1 :], action))

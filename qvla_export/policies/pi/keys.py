"""Keys of pi0 and pi0.5 checkpoints <-> names of our modules' parameters.

openpi's names, which LeRobot writes behind `model.`. Sources: openpi
`examples/convert_jax_model_to_pytorch.py`, lerobot 0.6.1 `policies/pi0/modeling_pi0.py`.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qvla_export.policies.pi.architecture import PiArchitecture

LEROBOT_PREFIX = "model."
_PALIGEMMA = "paligemma_with_expert.paligemma."
_EXPERT = "paligemma_with_expert.gemma_expert."
# Ours -> upstream's.
_PREFIXES = {
    "vision_tower.": f"{_PALIGEMMA}model.vision_tower.vision_model.",
    "multi_modal_projector.": f"{_PALIGEMMA}model.multi_modal_projector.linear.",
    "language_model.": f"{_PALIGEMMA}model.language_model.",
    "action_expert.": f"{_EXPERT}model.",
}
EMBEDDING = "language_model.embed_tokens.weight"
# The embedding is stored under its own name, the output layer's, or both.
_TIED = (f"{_PALIGEMMA}model.{EMBEDDING}", f"{_PALIGEMMA}lm_head.weight")


def upstream_key(name: str) -> str:
    """Return openpi's key of one of our parameters."""
    for ours, theirs in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def our_name(key: str) -> str:
    """Return our name of an openpi key."""
    for ours, theirs in _PREFIXES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return EMBEDDING if key == _TIED[1] else key


def without_prefix(keys: Iterable[str]) -> dict[str, str]:
    """Return openpi's key of each stored key, whichever of the two wrote it."""
    stored = list(keys)
    lerobot = f"{LEROBOT_PREFIX}action_in_proj.weight" in stored
    return {key: key.removeprefix(LEROBOT_PREFIX) if lerobot else key for key in stored}


def embedding_keys(stored: Iterable[str]) -> tuple[str, ...]:
    """Return the openpi keys that hold the embedding, the one it is read from first.

    openpi writes the output layer, which is tied to it; LeRobot 0.6 both.
    """
    present = set(stored)
    return tuple(key for key in _TIED if key in present) or _TIED[1:]


def unread_shapes(arch: PiArchitecture) -> dict[str, tuple[int, ...]]:
    """Return the openpi keys that every checkpoint has and no action depends on, with shapes.

    The expert's output layer, the language model's final norm, and of its last block all but what
    makes keys and values.
    """
    size, last = arch.language, arch.language.depth - 1
    block = f"{_PREFIXES['language_model.']}layers.{last}"
    rows = size.heads * size.head_dim
    return {
        f"{_EXPERT}lm_head.weight": (arch.vocab_size, arch.expert.width),
        f"{_PREFIXES['language_model.']}norm.weight": (size.width,),
        f"{block}.self_attn.q_proj.weight": (rows, size.width),
        f"{block}.self_attn.o_proj.weight": (size.width, rows),
        f"{block}.post_attention_layernorm.weight": (size.width,),
        f"{block}.mlp.gate_proj.weight": (size.mlp, size.width),
        f"{block}.mlp.up_proj.weight": (size.mlp, size.width),
        f"{block}.mlp.down_proj.weight": (size.width, size.mlp),
    }


def upstream_shapes(
    arch: PiArchitecture, own: Mapping[str, Tensor], stored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Return every key of an openpi checkpoint with a tensor of its shape, without numbers.

    Args:
        arch: the network.
        own: its state dict, of any device.
        stored: openpi keys of the checkpoint, which say under which name the embedding is.
    """
    shapes = {upstream_key(name): tuple(tensor.shape) for name, tensor in own.items()}
    shapes |= dict.fromkeys(embedding_keys(stored), shapes.pop(upstream_key(EMBEDDING)))
    shapes |= unread_shapes(arch)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}

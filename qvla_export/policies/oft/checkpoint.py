"""Read and write OpenVLA-OFT checkpoints in the published on-disk layout."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qvla_export.policies.oft.architecture import OftArchitecture
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.module import OftModule
from qvla_export.policies.prismatic.description import read_architecture
from qvla_export.policies.prismatic.files import HEAD
from qvla_export.policies.prismatic.keys import to_upstream
from qvla_export.policies.prismatic.network import load_network
from qvla_export.policies.prismatic.pretrained import OWN_NAMES, TOWER, TowerChoice, save_choice
from qvla_export.policies.prismatic.weights import CheckpointWeights
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.policy_interface import CONFIG_NAME, fitting_presets

# Heads' bodies, whose last layer has a row for each number of an action; columns: of the state.
_BODIES = {"l1": "action_head.model", "diffusion": "action_head.noise_predictor.mlp_resnet"}
_STATE = "proprio_projector.fc1.weight"


def load_module(
    checkpoint: Path, config: OftConfig, weights: CheckpointWeights, resident: bool = True
) -> OftModule:
    """Build the network of a checkpoint, with its weights as float32 or (device "meta") without.

    Raises:
        CheckpointError: keys do not fit; the message lists every missing, unexpected and misshapen
            key.
    """
    _require_dimensions(checkpoint, config, weights.shapes)
    arch = _architecture(checkpoint, config, weights.shapes)
    return load_network(checkpoint, lambda: OftModule(arch), weights, resident)


def _require_dimensions(checkpoint: Path, config: OftConfig, weights: Mapping[str, Tensor]) -> None:
    """Refuse a configuration of other actions or another state than the stored weights'."""
    head, projector = None, weights.get(_STATE)
    if config.head in _BODIES:
        head = weights.get(f"{_BODIES[config.head]}.fc2.weight")
    if head is None or (projector is None and config.state_dim):
        return  # a token head, or a missing file, which is said elsewhere
    stored = head.shape[0], 0 if projector is None else projector.shape[1]
    if stored != (config.action_dim, config.state_dim):
        raise CheckpointError(
            f"{checkpoint} acts in {stored[0]} dimensions and sees a state of {stored[1]}, the "
            f"policy's configuration says {config.action_dim} and {config.state_dim}: correct "
            f"{CONFIG_NAME} or the preset{fitting_presets(*stored)}"
        )


def save_module(
    module: OftModule, checkpoint: Path, step: int, pretrained: TowerChoice | None = None
) -> None:
    """Write weights into an existing folder as upstream does: bf16 body, DDP-style head files.

    Of a pretrained tower, its name and what `OWN_NAMES` says are written alone.
    """
    tensors = module.state_dict()
    if pretrained is not None:
        own = tuple(f"{TOWER}embeddings.{name}" for name in OWN_NAMES)
        tensors = {n: t for n, t in tensors.items() if not n.startswith(TOWER) or n in own}
        save_choice(pretrained, checkpoint)
    upstream = to_upstream(tensors)
    body: dict[str, Tensor] = {}
    names = ("action_head", "noisy_action_projector", "proprio_projector")
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, tensor in upstream.items():
        part = key.split(".", 1)[0]
        if part in parts:
            parts[part][f"module.{key.removeprefix(part + '.')}"] = tensor.to(torch.bfloat16)
        else:
            body[key] = tensor.to(torch.bfloat16).contiguous()
    if HEAD not in body:
        # Published files carry it even for L1 heads; tied, as small Llamas are.
        embedding = body["language_model.model.embed_tokens.weight"]
        body[HEAD] = embedding.clone()
    save_file(body, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for part, state in parts.items():
        if state:
            torch.save(state, checkpoint / f"{part}--{step}_checkpoint.pt")


def _architecture(
    checkpoint: Path, config: OftConfig, weights: Mapping[str, Tensor]
) -> OftArchitecture:
    shapes = read_architecture(checkpoint, config.vision_heads, weights)
    head_key = f"{_BODIES.get(config.head, '')}.fc1.weight"
    return OftArchitecture(
        **vars(shapes),
        horizon=config.horizon,
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        head=config.head,
        head_dim=weights[head_key].shape[0] if head_key in weights else 0,
        stop_token_id=config.stop_token_id,
        diffusion_train_steps=config.diffusion_train_steps,
        diffusion_steps=config.diffusion_steps,
        film=any(name.startswith("film.") for name in weights),
    )

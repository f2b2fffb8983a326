"""Read ACT checkpoints of LeRobot: which tensors are used, and the shapes that they say."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qvla_export.policies.act.config import read_act_config
from qvla_export.policies.act.module import ActArchitecture, ActModule
from qvla_export.policies.act.resnet import read_resnet
from qvla_export.policies.lerobot.weights import open_weights
from qvla_export.policies.prismatic.network import load_network
from qvla_export.policies.prismatic.weights import CheckpointWeights
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.lerobot.lerobot_config import LeRobotConfig

# The encoder of demonstrated actions, which trains the latent and is not there when a policy acts.
UNUSED = ("vae_encoder*",)
# Attention of a module -> its projections in the order of `in_proj_weight`, and how many of the
# three maps each is.
_PROJECTIONS = {
    "self_attn": (("qk_proj", 2), ("v_proj", 1)),
    "multihead_attn": (("query", 1), ("key", 1), ("value", 1)),
}
_MARK = ".in_proj_"


def load_module(checkpoint: Path, config: LeRobotConfig) -> tuple[ActModule, CheckpointWeights]:
    """Build the network of a checkpoint with its weights as float32.

    Raises:
        CheckpointError: keys do not fit, the message lists every missing, unexpected and misshapen
            key; or a part of the network is not built here.
    """
    weights = _apart(open_weights(checkpoint, UNUSED))
    arch = _architecture(config, weights)
    module = load_network(checkpoint, lambda: ActModule(arch), weights, resident=True)
    return module, weights


def upstream_tensors(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return LeRobot's tensors, without `model.`, of ours: the projections of attention joined.

    Args:
        own: our name -> tensor.
    """
    tensors: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in own.items():
        owner, _, kind = name.rpartition(".")
        parent, _, member = owner.rpartition(".")
        members = dict(_PROJECTIONS.get(parent.rpartition(".")[2], ()))
        if member in members:
            parts.setdefault(f"{parent}{_MARK}{kind}", []).append(tensor)
        else:
            tensors[name] = tensor
    return {**tensors, **{name: torch.cat(rows) for name, rows in parts.items()}}


def _architecture(config: LeRobotConfig, weights: CheckpointWeights) -> ActArchitecture:
    own, file = read_act_config(config), config.node.file

    def size(name: str, axis: int) -> int:
        shape = weights.shapes[name].shape if name in weights.shapes else ()
        if axis >= len(shape):
            raise CheckpointError(f"{file}: the weights beside it lack {name}")
        return int(shape[axis])

    width = size("action_head.weight", 1)
    if width % own.heads or width % 4:
        raise CheckpointError(
            f"{file}: the width {width} must divide into n_heads {own.heads} and by 4"
        )
    camera = next(iter(config.cameras.values()))
    return ActArchitecture(
        config=own,
        backbone=read_resnet(weights.shapes, "backbone."),
        picture=(camera.height, camera.width),
        width=width,
        hidden=size("encoder.layers.0.linear1.weight", 0),
        latent_dim=size("encoder_latent_input_proj.weight", 1),
        state_dim=config.state_dim,
        action_dim=config.action_dim,
    )


def _apart(weights: CheckpointWeights) -> CheckpointWeights:
    """Name each projection's rows of `in_proj_weight` and `in_proj_bias`."""
    shapes: dict[str, Tensor] = {}
    places = dict(weights.places)
    rows: dict[str, slice] = {}
    for name, tensor in weights.shapes.items():
        parts = list(_projections(name, tensor))
        if not parts:
            shapes[name] = tensor
            continue
        place = places.pop(name)
        for part, taken in parts:
            shapes[part], places[part], rows[part] = tensor[taken], place, taken
    return replace(weights, shapes=shapes, places=places, rows=rows)


def _projections(name: str, tensor: Tensor) -> Iterator[tuple[str, slice]]:
    parent, mark, kind = name.partition(_MARK)
    members = _PROJECTIONS.get(parent.rpartition(".")[2], ())
    if not mark or tensor.shape[0] % 3:
        return
    third, start = tensor.shape[0] // 3, 0
    for member, maps in members:
        yield f"{parent}.{member}.{kind}", slice(start, start + maps * third)
        start += maps * third

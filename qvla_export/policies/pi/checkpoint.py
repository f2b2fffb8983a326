"""Read pi0 and pi0.5 checkpoints: every key is checked before any number is read."""

from pathlib import Path

import torch
from torch import Tensor

from qvla_export.policies.flow.spec import FlowSpec
from qvla_export.policies.pi.description import read_architecture
from qvla_export.policies.pi.files import require_weights_alone
from qvla_export.policies.pi.keys import embedding_keys, our_name, upstream_shapes, without_prefix
from qvla_export.policies.pi.module import PiModule
from qvla_export.policies.prismatic.keys import check_keys
from qvla_export.policies.prismatic.network import fill_network
from qvla_export.policies.prismatic.weights import CheckpointWeights, stored_tensors


def load_module(
    checkpoint: Path, vision_heads: int, flow: FlowSpec, resident: bool = True
) -> tuple[PiModule, CheckpointWeights]:
    """Build the network of a checkpoint, with its weights as float32 or (device "meta") without.

    Args:
        checkpoint: folder of openpi's or LeRobot's layout.
        vision_heads: of SigLIP.
        flow: how it is integrated.
        resident: False leaves the weights on disk.

    Raises:
        CheckpointError: no weights, a missing, truncated or unsafe file, one that would not be
            used; or keys do not fit: the message lists every missing, unexpected and misshapen
            one. Nothing is ever left at random numbers.
    """
    weights, stored = open_weights(checkpoint)
    arch = read_architecture(checkpoint, vision_heads, flow, weights.shapes)
    with torch.device("meta"):
        empty = PiModule(arch)
    expected = upstream_shapes(arch, empty.state_dict(), stored)
    check_keys(stored, expected, (), str(checkpoint))
    if not resident:
        return empty.eval().requires_grad_(False), weights
    return fill_network(lambda: PiModule(arch), weights), weights


def open_weights(checkpoint: Path) -> tuple[CheckpointWeights, dict[str, Tensor]]:
    """Find every tensor of a checkpoint.

    Returns:
        Where those that are read lie, by our names; and all by openpi's keys, without numbers.

    Raises:
        CheckpointError: no weights, a missing, truncated or unsafe file, or one that would not be
            used.
    """
    require_weights_alone(checkpoint)
    tensors = stored_tensors(checkpoint)
    keys = without_prefix(key for _, key, _ in tensors)
    stored = {keys[key]: tensor for _, key, tensor in tensors}
    shapes: dict[str, Tensor] = {}
    places: dict[str, tuple[Path, str]] = {}
    second = embedding_keys(stored)[1:]
    for path, key, tensor in tensors:
        if keys[key] in second:
            continue
        name = our_name(keys[key])
        shapes[name], places[name] = tensor, (path, key)
    return CheckpointWeights(shapes, places, {}, renamed=False), stored

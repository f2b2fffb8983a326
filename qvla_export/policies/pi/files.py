"""The files of a pi0 or pi0.5 checkpoint folder that hold weights; others are refused."""

import math
from collections.abc import Mapping
from pathlib import Path

from qvla_export.policies.adapters import require_whole_tensors
from qvla_export.policies.lerobot.files import require_parts_used
from qvla_export.policies.pi.lerobot import STEPS, is_lerobot_pi
from qvla_export.policies.prismatic.files import body_files, require_all_used, stored_headers
from qvla_export.shared.errors import CheckpointError

_TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings."


def require_weights_alone(checkpoint: Path) -> None:
    """Refuse a folder with stored parts that the policy would act without.

    Raises:
        CheckpointError: naming every such file, what it is and what to do.
        StatisticsError, ArtifactError: LeRobot's configuration or processors are malformed.
    """
    if is_lerobot_pi(checkpoint):
        require_parts_used(checkpoint, STEPS)
    else:
        require_all_used(checkpoint, body_files(checkpoint), {})


def check_files(checkpoint: Path) -> None:
    """Refuse a folder by its files' names and headers alone; needs no torch.

    Raises:
        CheckpointError: a part that would not be used, a missing or damaged file, weights that
            were quantized elsewhere, or an adapter.
    """
    require_weights_alone(checkpoint)
    require_whole_tensors(checkpoint, (stored.key for stored in stored_headers(checkpoint)))


def image_side(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the pixels of a side of the network's images, from the shapes of its weights.

    Raises:
        CheckpointError: they are not among the weights.
    """
    patch = _size(shapes, f"{_TOWER}patch_embedding.weight", -1)
    return patch * math.isqrt(_size(shapes, f"{_TOWER}position_embedding.weight", 0))


def action_width(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the numbers of an action in the network, from the shapes of its weights.

    Raises:
        CheckpointError: they are not among the weights.
    """
    return _size(shapes, "action_in_proj.weight", 1)


def _size(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int) -> int:
    try:
        return shapes[name][axis]
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"weights are missing that tell the network's sizes: {name}"
        ) from error

"""Where the tensors of an OpenVLA-OFT checkpoint lie: the body, and the files of its head."""

from collections.abc import Callable
from pathlib import Path

from qvla_export.policies.adapters import settings_file
from qvla_export.policies.low_rank import read_settings
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.files import (
    FILM_PART,
    film_file,
    part_file,
    part_names,
    require_no_film,
    require_parts_used,
)
from qvla_export.policies.oft.film import film_key
from qvla_export.policies.prismatic.files import HEAD, check_body
from qvla_export.policies.prismatic.pretrained import PRETRAINED, read_choice
from qvla_export.policies.prismatic.weights import (
    CheckpointWeights,
    open_body,
    open_pretrained,
    open_state_file,
)
from qvla_export.shared.errors import CheckpointError


def open_weights(checkpoint: Path, config: OftConfig) -> CheckpointWeights:
    """Find every tensor of a checkpoint: safetensors, single or sharded, and the head files.

    Raises:
        CheckpointError: no weights, a missing, truncated or unsafe file, one that would not be
            used, an adapter's, or a pretrained tower that is not installed.
    """
    require_parts_used(checkpoint, config)
    require_no_film(checkpoint, check_body(checkpoint))
    weights = open_body(checkpoint)
    if config.head != "tokens":
        # Replaced by the action head, but part of every published file.
        weights = weights.without(HEAD)
    if choice := read_choice(checkpoint):
        tower = open_pretrained(choice)
        if twice := sorted(set(tower.shapes) & set(weights.shapes)):
            raise CheckpointError(
                f"{checkpoint} stores {twice[0]}, which {PRETRAINED} leaves to "
                f"{choice.tower.package}; remove that file if the weights here are meant"
            )
        weights = weights.with_others(tower)
    if film := film_file(checkpoint):
        for name in [name for name in weights.shapes if name.startswith(f"{FILM_PART}.")]:
            weights = weights.without(name)
        weights = weights.with_others(open_state_file(film, film_key, _film_scale(checkpoint)))
    for part in part_names(config):
        weights = weights.with_part(part, part_file(checkpoint, part))
    return weights


def _film_scale(checkpoint: Path) -> Callable[[int], float]:
    """Return what low-rank factors in the towers' file are multiplied by, from their rank.

    Upstream stores the towers with the adapter that they were trained with, whose alpha its own
    loader takes for 16, or the rank where that is less (`openvla_utils.py`, `_apply_film_to_vla`).
    """
    said = settings_file(checkpoint)
    return read_settings(said).scale if said else lambda rank: min(rank, 16) / rank

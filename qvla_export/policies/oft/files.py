"""The files of an OpenVLA-OFT checkpoint folder: those that are read, and those that none reads."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.prismatic.files import body_files, check_body, require_all_used
from qvla_export.policies.prismatic.pretrained import require_tower
from qvla_export.shared.errors import CheckpointError

# What a part is called that replaces the towers of the body.
FILM_PART = "vision_backbone"
_FILM = (
    "FiLM layers and the vision towers fine-tuned with them (use_film=True), without which "
    "the policy acts wrongly; they are read from vision_backbone--STEP_checkpoint.pt in the "
    "checkpoint's own folder"
)
# openvla-oft's `FiLMedVisionTransformerBlock`: a block beside its scale and its shift.
_FILM_KEY = re.compile(r"vision_backbone\..*blocks\.\d+\.(scale|shift|block)\.")
# Pattern -> what such a file is, and what to do with it.
_UNUSED: Mapping[str, str] = {
    "*vision_backbone--*": _FILM,
    "*noisy_action_projector*": (
        "part of a diffusion head, but the policy's configuration says another: set head to "
        "'diffusion', or move the file out of the folder"
    ),
    "*action_head*": (
        "an action head, but the policy's configuration says head 'tokens': set head to 'l1' or "
        "'diffusion', or move the file out of the folder"
    ),
    "*proprio_projector*": (
        "a projector of the robot's state, but the policy's configuration says state_dim 0: set "
        "state_dim, or move the file out of the folder"
    ),
}


def part_names(config: OftConfig) -> tuple[str, ...]:
    """Return the parts of a policy that have files of their own, beside the body."""
    used = {
        "action_head": config.head != "tokens",
        "noisy_action_projector": config.head == "diffusion",
        "proprio_projector": config.state_dim > 0,
    }
    return tuple(name for name, needed in used.items() if needed)


def part_file(checkpoint: Path, part: str) -> Path:
    """Return the only `{part}--*_checkpoint.pt` of a checkpoint.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    files = _part_files(checkpoint, part)
    if len(files) != 1:
        raise CheckpointError(
            f"{checkpoint} must hold exactly one {part}--STEP_checkpoint.pt, "
            f"found {[p.name for p in files]}"
        )
    return files[0]


def film_file(checkpoint: Path) -> Path | None:
    """Return the vision towers with FiLM layers of a checkpoint; None where it has none.

    Raises:
        CheckpointError: there is more than one.
    """
    if not _part_files(checkpoint, FILM_PART):
        return None
    return part_file(checkpoint, FILM_PART)


def require_parts_used(checkpoint: Path, config: OftConfig) -> None:
    """Refuse a folder with stored parts that the policy would act without.

    Raises:
        CheckpointError: naming every such file, what it is and what to do.
    """
    used = set(body_files(checkpoint))
    for part in (*part_names(config), FILM_PART):
        used |= set(_part_files(checkpoint, part))
    require_all_used(checkpoint, used, _UNUSED)


def require_no_film(checkpoint: Path, keys: Iterable[str]) -> None:
    """Refuse stored keys of FiLM layers, which openvla-oft puts around the blocks of the towers.

    Raises:
        CheckpointError: naming one of them and what to do.
    """
    if film := next((key for key in keys if _FILM_KEY.search(key)), None):
        raise CheckpointError(f"{checkpoint} stores {film}, one of {_FILM}")


def check_files(checkpoint: Path, config: OftConfig) -> None:
    """Refuse a folder by its files' names and headers alone; needs no torch.

    Raises:
        CheckpointError: a part that would not be used, a missing or damaged file, FiLM layers,
            weights that were quantized elsewhere, an adapter, or a pretrained tower that is not
            installed.
    """
    require_parts_used(checkpoint, config)
    require_tower(checkpoint)
    require_no_film(checkpoint, check_body(checkpoint))
    for part in part_names(config):
        part_file(checkpoint, part)
    film_file(checkpoint)


def _part_files(checkpoint: Path, part: str) -> list[Path]:
    return sorted(checkpoint.glob(f"*{part}*checkpoint*"))

"""The files of a LeRobot checkpoint folder: those that are read, and those that none reads."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from qvla_export.policies.prismatic.files import body_files, require_all_used, stored_headers
from qvla_export.shared.artifacts import sha256_file, sha256_tree
from qvla_export.shared.lerobot.lerobot_config import CONFIG
from qvla_export.shared.lerobot.lerobot_statistics import (
    POSTPROCESSOR,
    PREPROCESSOR,
    has_processors,
    read_steps,
)

_UNUSED: Mapping[str, str] = {
    "policy_*processor_step_*": (
        "statistics that no step of the processor files names; move them out, or save the "
        "processors again"
    ),
}


def check_files(checkpoint: Path, known: Collection[str]) -> None:
    """Refuse a folder by its files' names and headers alone; needs no torch.

    Args:
        checkpoint: the folder.
        known: names of the family's own processor steps, see `read_steps`.

    Raises:
        CheckpointError: a part that would not be used, a missing or damaged file, weights that
            were quantized elsewhere, or an adapter.
        StatisticsError: a processor's step that is not computed here.
    """
    require_parts_used(checkpoint, known)
    stored_headers(checkpoint)


def require_parts_used(checkpoint: Path, known: Collection[str]) -> None:
    """Refuse a folder with stored parts that the policy would act without.

    Args:
        checkpoint: the folder.
        known: as `check_files`.

    Raises:
        CheckpointError: naming every such file, what it is and what to do.
        StatisticsError, ArtifactError: as `state_files`.
    """
    used = (*body_files(checkpoint), *state_files(checkpoint, known))
    require_all_used(checkpoint, used, _UNUSED)


def checkpoint_digest(checkpoint: Path, known: Collection[str], more: Collection[Path] = ()) -> str:
    """Return the SHA-256 over all that decides actions: configuration, processors, weights.

    Args:
        checkpoint: the folder.
        known: as `check_files`.
        more: further files that are read.
    """
    names = [CONFIG]
    if has_processors(checkpoint):
        names += [f"{PREPROCESSOR}.json", f"{POSTPROCESSOR}.json"]
    names += [path.name for path in state_files(checkpoint, known)]
    names += [path.name for path in checkpoint.glob("model*.safetensors*")]
    files = sha256_tree(checkpoint, names)
    identity = {"lerobot": files, **{path.name: sha256_file(path) for path in more}}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def state_files(checkpoint: Path, known: Collection[str]) -> list[Path]:
    """Return the files of statistics that the steps of the processors name; none without them.

    Args:
        checkpoint: the folder.
        known: as `check_files`.

    Raises:
        StatisticsError, ArtifactError: a processor file is malformed, or a step is unknown.
    """
    if not has_processors(checkpoint):
        return []
    steps = [
        step
        for name in (PREPROCESSOR, POSTPROCESSOR)
        for step in read_steps(checkpoint, name, known)
    ]
    return [step.state_file for step in steps if step.state_file is not None]

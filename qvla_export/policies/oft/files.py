"""The files of an OpenVLA-OFT checkpoint folder: those that are read, and those that none reads."""

import fnmatch
from collections.abc import Mapping
from pathlib import Path

from qvla_export.policies.oft.config import OftConfig
from qvla_export.shared.artifacts import read_json
from qvla_export.shared.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz", ".gguf")
# What trainers leave behind; no policy reads it.
_TRAINING = (
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "scaler*",
    "training_args.bin",
    "training_state*",
)
# Pattern -> what such a file is, and what to do with it.
_UNUSED: Mapping[str, str] = {
    "*vision_backbone--*": (
        "FiLM layers and the vision towers fine-tuned with them (use_film=True), without which "
        "the policy acts wrongly; FiLM is not built here: train with use_film=False"
    ),
    "*noisy_action_projector*": (
        "part of a diffusion head (use_diffusion=True), which is not built here: train with "
        "use_l1_regression=True"
    ),
    "*action_head*": (
        "an action head, but the policy's configuration says head 'tokens': set head to 'l1', or "
        "move the file out of the folder"
    ),
    "*proprio_projector*": (
        "a projector of the robot's state, but the policy's configuration says state_dim 0: set "
        "state_dim, or move the file out of the folder"
    ),
    "model*.safetensors": (
        "weights that do not belong to those read; two saves in one folder? Move one out"
    ),
    "pytorch_model*.bin": (
        "weights in another format beside those read; move it out if they are the same"
    ),
}
_UNKNOWN = "no part of this policy that is known here; move it out if the policy acts without it"


def body_files(checkpoint: Path) -> tuple[Path, ...]:
    """Return `model.safetensors` or the shards that its index names, whether they exist or not.

    Raises:
        CheckpointError: the index does not name shards.
    """
    index = checkpoint / INDEX
    if not index.is_file():
        return (checkpoint / _SINGLE,)
    return tuple(checkpoint / name for name in sorted(set(read_weight_map(index).values())))


def read_weight_map(index: Path) -> dict[str, str]:
    """Return upstream key -> name of its shard.

    Raises:
        CheckpointError: the index is damaged or names files of another folder.
    """
    value = read_json(index, "shard index")
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    if not all(isinstance(name, str) and Path(name).name == name for name in names.values()):
        raise CheckpointError(f"{index} must name files of its own folder, got {names!r:.200}")
    return names


def part_names(config: OftConfig) -> tuple[str, ...]:
    """Return the parts of a policy that have files of their own, beside the body."""
    used = {"action_head": config.head == "l1", "proprio_projector": config.state_dim > 0}
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


def require_all_used(checkpoint: Path, config: OftConfig) -> None:
    """Refuse a folder with stored parts that the policy would act without.

    Raises:
        CheckpointError: naming every such file, what it is and what to do.
    """
    used = set(body_files(checkpoint))
    for part in part_names(config):
        used |= set(_part_files(checkpoint, part))
    unused = [
        f"  {path.name}: {_description(path.name)}"
        for path in sorted(checkpoint.iterdir())
        if path.suffix in _WEIGHTS
        and path not in used
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _TRAINING)
    ]
    if unused:
        raise CheckpointError(
            f"{checkpoint} holds parts of a policy that would not be used:\n" + "\n".join(unused)
        )


def _part_files(checkpoint: Path, part: str) -> list[Path]:
    return sorted(checkpoint.glob(f"*{part}*checkpoint*"))


def _description(name: str) -> str:
    kinds = (kind for pattern, kind in _UNUSED.items() if fnmatch.fnmatch(name, pattern))
    return next(kinds, _UNKNOWN)

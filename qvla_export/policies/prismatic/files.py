"""The files that hold a network's body, and those of a folder that nothing reads."""

import fnmatch
from collections.abc import Collection, Mapping
from pathlib import Path

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
# Pattern -> what such a file is, and what to do with it; families know more.
_UNUSED: Mapping[str, str] = {
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


def require_all_used(checkpoint: Path, used: Collection[Path], unused: Mapping[str, str]) -> None:
    """Refuse a folder with stored parts that the policy would act without.

    Args:
        checkpoint: the folder.
        used: files of it that are read.
        unused: pattern -> what a file of that name is, and what to do with it.

    Raises:
        CheckpointError: naming every such file, what it is and what to do.
    """
    kinds = {**unused, **_UNUSED}
    found = [
        f"  {path.name}: {_description(path.name, kinds)}"
        for path in sorted(checkpoint.iterdir())
        if path.suffix in _WEIGHTS
        and path not in used
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _TRAINING)
    ]
    if found:
        raise CheckpointError(
            f"{checkpoint} holds parts of a policy that would not be used:\n" + "\n".join(found)
        )


def _description(name: str, kinds: Mapping[str, str]) -> str:
    fitting = (kind for pattern, kind in kinds.items() if fnmatch.fnmatch(name, pattern))
    return next(fitting, _UNKNOWN)

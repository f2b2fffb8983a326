"""The files that hold a network's body, and those of a folder that nothing reads."""

import fnmatch
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qvla_export.policies.adapters import (
    adapter_file,
    body_folder,
    is_merged_adapter,
    require_whole_tensors,
)
from qvla_export.policies.low_rank import read_settings, split_keys
from qvla_export.shared.artifacts import read_json
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.git_lfs import refuse_pointer
from qvla_export.shared.json_documents import is_file_name

# The decoder's output layer.
HEAD = "language_model.lm_head.weight"
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# safetensors' names of what weights may be stored as.
_FLOATS = ("BF16", "F16", "F32", "F64")
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
    "adapter_model*": (
        "a low-rank adapter: if it is merged into the weights, move its folder out; if not, merge "
        "it with vla-scripts/merge_lora_weights_and_save.py of openvla-oft"
    ),
}
_UNKNOWN = "no part of this policy that is known here; move it out if the policy acts without it"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of the body lies."""

    path: Path
    # Upstream's name.
    key: str
    shape: tuple[int, ...]


def body_files(checkpoint: Path) -> tuple[Path, ...]:
    """Return `model.safetensors` or the shards that its index names, whether they exist or not.

    Where a checkpoint is an adapter they are its base's, see `adapters.adapter_base`.

    Raises:
        CheckpointError: the index does not name shards.
    """
    folder = body_folder(checkpoint)
    index = folder / INDEX
    if not index.is_file():
        return (folder / _SINGLE,)
    return tuple(folder / name for name in sorted(set(read_weight_map(index).values())))


def read_weight_map(index: Path) -> dict[str, str]:
    """Return upstream key -> name of its shard.

    Raises:
        CheckpointError: the index is damaged or names files of another folder.
    """
    value = read_json(index, "shard index")
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    if not all(isinstance(name, str) and is_file_name(name) for name in names.values()):
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
        f"  {path.relative_to(checkpoint)}: {_description(path.name, kinds)}"
        for path in _stored_files(checkpoint)
        if path not in used
        and path != adapter_file(checkpoint)
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _TRAINING)
        and not is_merged_adapter(path.relative_to(checkpoint))
    ]
    if found:
        raise CheckpointError(
            f"{checkpoint} holds parts of a policy that would not be used:\n" + "\n".join(found)
        )


def stored_headers(checkpoint: Path, low_rank: bool = False) -> list[StoredTensor]:
    """Return every tensor of `model.safetensors` or its shards, as their headers say; no torch.

    Args:
        checkpoint: the folder.
        low_rank: whether low-rank factors may be among them, which the caller merges.

    Raises:
        CheckpointError: no weights, a missing or truncated file, quantized, or an adapter's.
    """
    index = body_folder(checkpoint) / INDEX
    found = [stored for path in body_files(checkpoint) for stored in file_headers(path)]
    named = read_weight_map(index) if index.is_file() else {}
    absent = sorted(set(named) - {stored.key for stored in found})
    if absent:
        raise CheckpointError(f"{index} names weights that no shard holds: {absent}")
    if not low_rank:
        require_whole_tensors(checkpoint, (stored.key for stored in found))
    return found


def check_body(checkpoint: Path) -> tuple[str, ...]:
    """Refuse a body by its files' headers; return upstream's keys, those of factors left out.

    Raises:
        CheckpointError: no weights, a missing or truncated file, quantized, or an adapter of a
            kind that is not merged here.
    """
    keys = [stored.key for stored in stored_headers(checkpoint, low_rank=True)]
    if adapter := adapter_file(checkpoint):
        split_keys((stored.key for stored in file_headers(adapter)), adapter)
        read_settings(adapter.with_name("adapter_config.json"))
    return tuple(split_keys(keys, checkpoint).weights)


def merges_on_load(checkpoint: Path) -> int:
    """Return how many weights of a body an adapter changes when they are read.

    Raises:
        CheckpointError: as `check_body`.
    """
    adapter = adapter_file(checkpoint)
    keys = [stored.key for stored in stored_headers(checkpoint, low_rank=True)]
    loose = [] if adapter is None else [stored.key for stored in file_headers(adapter)]
    return len(split_keys(keys, checkpoint).factors) + len(split_keys(loose, checkpoint).factors)


def file_headers(path: Path) -> list[StoredTensor]:
    """Return every tensor of a safetensors file, as its header says; no torch.

    Raises:
        CheckpointError: a missing or truncated file, or quantized weights.
    """
    if not path.is_file():
        raise CheckpointError(f"weights not found: {path}")
    found = []
    try:
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                stored = file.get_slice(key)
                _require_float(stored.get_dtype(), path, key)
                found.append(StoredTensor(path, key, tuple(stored.get_shape())))
    except (SafetensorError, OSError) as error:
        raise incomplete(path, error) from error
    return found


def incomplete(path: Path, error: Exception) -> CheckpointError:
    """Return the error of a safetensors file that cannot be read.

    Raises:
        ArtifactError: it is a pointer to one.
    """
    refuse_pointer(path)
    return CheckpointError(
        f"{path} is not a complete safetensors file ({error}); download it again"
    )


def _require_float(dtype: str, path: Path, key: str) -> None:
    if dtype not in _FLOATS:
        raise CheckpointError(
            f"{path}: {key} is stored as {dtype}, quantized by another tool; its scales are not "
            "applied here: name the checkpoint in float16, bfloat16 or float32 it was made from"
        )


def _stored_files(checkpoint: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those in it that weights are stored in, in order."""
    for folder, folders, names in os.walk(checkpoint):
        # Caches of downloads and of version control.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix in _WEIGHTS:
                yield Path(folder) / name


def _description(name: str, kinds: Mapping[str, str]) -> str:
    fitting = (kind for pattern, kind in kinds.items() if fnmatch.fnmatch(name, pattern))
    return next(fitting, _UNKNOWN)

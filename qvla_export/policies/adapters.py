"""Low-rank adapters of another model, which are no policy until they are merged into it."""

from collections.abc import Iterable
from pathlib import Path

from qvla_export.shared.artifacts import read_json
from qvla_export.shared.errors import CheckpointError, QvlaError

_CONFIG = "adapter_config.json"
# Where OpenVLA-OFT leaves one that its `merge_lora_during_training` may have merged.
_FOLDER = "lora_adapter"
_KEYS = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector")


def require_merged(checkpoint: Path) -> None:
    """Refuse a folder whose weights are, in whole or in part, an adapter of another model.

    An adapter in `lora_adapter/` beside whole weights is what they were merged from, and is left
    alone: openvla-oft's `finetune.py` writes both or only the adapter.

    Raises:
        CheckpointError: naming the base model and how to merge.
    """
    if (checkpoint / _CONFIG).is_file():
        raise _unmerged(checkpoint, checkpoint / _CONFIG)
    config = checkpoint / _FOLDER / _CONFIG
    if config.is_file() and not any(checkpoint.glob("model*.safetensors*")):
        raise _unmerged(checkpoint, config)


def is_merged_adapter(path: Path) -> bool:
    """Whether a file, named from its checkpoint's folder, is an adapter that was merged into it."""
    return path.parent == Path(_FOLDER) and path.stem == "adapter_model"


def require_whole_tensors(checkpoint: Path, keys: Iterable[str]) -> None:
    """Refuse stored keys that are an adapter's: low-rank factors beside what they change.

    Raises:
        CheckpointError: as `require_merged`.
    """
    if any(part in key for key in keys for part in _KEYS):
        raise _unmerged(checkpoint, checkpoint / _FOLDER / _CONFIG)


def _unmerged(checkpoint: Path, config: Path) -> CheckpointError:
    base = _base(config)
    return CheckpointError(
        f"{checkpoint} holds an adapter of {base}, not merged: merge it with "
        f"`python vla-scripts/merge_lora_weights_and_save.py --base_checkpoint {base} "
        f"--lora_finetuned_checkpoint_dir {checkpoint}` of openvla-oft, or with peft's "
        "merge_and_unload, and name the merged folder"
    )


def _base(config: Path) -> str:
    try:
        value = read_json(config, "adapter configuration")
    except QvlaError:
        return "BASE"
    name = value.get("base_model_name_or_path") if isinstance(value, dict) else None
    return name if isinstance(name, str) and name else "BASE"

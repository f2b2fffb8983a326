"""Low-rank adapters in checkpoint folders: which are merged, which are merged on load, the rest.

openvla-oft's `finetune.py` leaves the adapter in `lora_adapter/`, beside whole weights where it has
merged them, else alone; peft's `save_pretrained` leaves it in the folder itself.
"""

from collections.abc import Iterable
from pathlib import Path

from qvla_export.shared.artifacts import read_json
from qvla_export.shared.errors import CheckpointError, QvlaError

_CONFIG = "adapter_config.json"
_FOLDER = "lora_adapter"
_FILE = "adapter_model.safetensors"
_KEYS = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector")
_BODY = "model*.safetensors*"


def loose_adapter(checkpoint: Path) -> Path | None:
    """Return the folder of an adapter that no weights of this checkpoint hold; None without one.

    An adapter in `lora_adapter/` beside whole weights is what they were merged from.
    """
    if (checkpoint / _CONFIG).is_file():
        return checkpoint
    alone = not any(checkpoint.glob(_BODY))
    return checkpoint / _FOLDER if alone and (checkpoint / _FOLDER / _CONFIG).is_file() else None


def adapter_base(checkpoint: Path) -> Path | None:
    """Return the folder of the weights that a loose adapter changes; None where it is not here.

    It is what `base_model_name_or_path` names: a folder, from the checkpoint's own or absolute.
    """
    adapter = loose_adapter(checkpoint)
    if adapter is None or not (adapter / _FILE).is_file():
        return None
    base = checkpoint / _base_name(adapter / _CONFIG)
    try:
        whole = base.is_dir() and any(base.glob(_BODY)) and base.resolve() != checkpoint.resolve()
    except OSError:  # a name that is too long, a folder of somebody else's
        return None
    return base if whole and loose_adapter(base) is None else None


def adapter_file(checkpoint: Path) -> Path | None:
    """Return the weights of an adapter that is merged on load; None where there is none."""
    adapter = loose_adapter(checkpoint)
    return None if adapter is None or adapter_base(checkpoint) is None else adapter / _FILE


def body_folder(checkpoint: Path) -> Path:
    """Return where a checkpoint's body lies: in its folder, or its adapter's base's."""
    return adapter_base(checkpoint) or checkpoint


def model_config(checkpoint: Path) -> Path:
    """Return `config.json` of a checkpoint; where it has none, of its adapter's base."""
    own = checkpoint / "config.json"
    return own if own.is_file() else body_folder(checkpoint) / "config.json"


def require_merged(checkpoint: Path) -> None:
    """Refuse a folder whose weights are an adapter of a model that is not here.

    Raises:
        CheckpointError: naming the base model and how to merge.
    """
    adapter = loose_adapter(checkpoint)
    if adapter is not None and adapter_base(checkpoint) is None:
        raise _unmerged(checkpoint, adapter / _CONFIG)


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


def settings_file(checkpoint: Path) -> Path | None:
    """Return the `adapter_config.json` that speaks of a checkpoint's low-rank factors."""
    files = (checkpoint / _CONFIG, checkpoint / _FOLDER / _CONFIG)
    return next((path for path in files if path.is_file()), None)


def _unmerged(checkpoint: Path, config: Path) -> CheckpointError:
    base = _base_name(config)
    return CheckpointError(
        f"{checkpoint} holds an adapter of {base}, not merged: merge it with "
        f"`python vla-scripts/merge_lora_weights_and_save.py --base_checkpoint {base} "
        f"--lora_finetuned_checkpoint_dir {checkpoint}` of openvla-oft, or with peft's "
        "merge_and_unload, and name the merged folder; it is merged on load where "
        f"base_model_name_or_path of {_CONFIG} names a folder with the base's weights"
    )


def _base_name(config: Path) -> str:
    try:
        value = read_json(config, "adapter configuration")
    except QvlaError:
        return "BASE"
    name = value.get("base_model_name_or_path") if isinstance(value, dict) else None
    return name if isinstance(name, str) and name else "BASE"

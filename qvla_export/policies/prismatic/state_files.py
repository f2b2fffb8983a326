"""Files that torch saved: heads, projectors and the like, beside a body's safetensors."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.git_lfs import refuse_pointer


def read_state_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a head file by their keys, mapped where its format can be.

    Raises:
        CheckpointError: it is no state dict, or cannot be loaded without running code.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        right = isinstance(state, dict) and all(map(_is_stored, state, state.values()))
    except Exception as error:  # the restricted unpickler raises anything, over whatever byte
        reason = " ".join(str(error).split())
        refuse_pointer(path)
        raise CheckpointError(
            f"{path} cannot be loaded safely: {type(error).__name__}: {reason:.300}; download it "
            "again"
        ) from error
    if not right:
        raise CheckpointError(f"{path} must hold a state dict of floating point tensors")
    tensors = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if len(tensors) != len(state):
        raise CheckpointError(f"{path} holds keys with and without 'module.' for the same tensor")
    return tensors


def require_undamaged(path: Path) -> None:
    """Check what a head file says of its own bytes; torch does not look.

    Raises:
        CheckpointError: a checksum is wrong, or an entry is none that torch writes.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} not found")
    try:
        if not zipfile.is_zipfile(path):
            return  # as torch wrote before 1.6, without checksums
        with zipfile.ZipFile(path) as file:
            packed = [entry.filename for entry in file.infolist() if entry.compress_type]
            wrong = None if packed else file.testzip()
    except Exception as error:  # zipfile raises anything, over whatever byte
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from error
    if packed:
        raise CheckpointError(
            f"{path} holds compressed entries, which torch never writes: {packed[0]!r:.80}"
        )
    if wrong is not None:
        raise CheckpointError(
            f"{path}: the checksum of {wrong!r:.80} is wrong, the file is damaged; download it "
            "again, or save it again with torch.save"
        )


def _is_stored(key: object, value: object) -> bool:
    """Whether an entry is a tensor whose numbers are all in the file."""
    return (
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )

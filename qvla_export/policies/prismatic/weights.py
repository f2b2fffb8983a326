"""The tensors of a checkpoint under this project's names, each read on demand."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qvla_export.policies.prismatic.files import incomplete, stored_headers
from qvla_export.policies.prismatic.keys import from_upstream
from qvla_export.shared.errors import CheckpointError

# Of a file, mapped at once while a tensor is converted.
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class CheckpointWeights:
    """Where each tensor of a checkpoint lies; holds none of their numbers."""

    # Our name -> the tensor without its numbers (device "meta").
    shapes: Mapping[str, Tensor]
    # Our name -> safetensors file and upstream key.
    places: Mapping[str, tuple[Path, str]]
    # Our name -> head file and the part's name, which goes before its keys.
    parts: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    # Our name -> the rows that are read, where not all are; `shapes` has these alone.
    rows: Mapping[str, slice] = field(default_factory=dict)
    # False where a stored tensor is one of ours as it is, whatever it is called.
    renamed: bool = True

    def without(self, name: str) -> "CheckpointWeights":
        """Return these weights but one tensor, which nothing reads."""
        shapes = {key: tensor for key, tensor in self.shapes.items() if key != name}
        return replace(self, shapes=shapes)

    def with_rows(self, name: str, rows: slice) -> "CheckpointWeights":
        """Return these weights with some rows of a tensor for the whole."""
        shapes = {**self.shapes, name: self.shapes[name][rows]}
        return replace(self, shapes=shapes, rows={**self.rows, name: rows})

    def with_part(self, part: str, file: Path) -> "CheckpointWeights":
        """Return these weights and those of a part's own file.

        Raises:
            CheckpointError: as `require_undamaged` and `read_state_file`.
        """
        require_undamaged(file)
        tensors = {f"{part}.{key}": value for key, value in read_state_file(file).items()}
        shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
        places = dict.fromkeys(tensors, (file, part))
        return replace(self, shapes={**self.shapes, **shapes}, parts={**self.parts, **places})

    def read(self, name: str) -> Tensor:
        """Return a tensor by our name, as stored.

        Raises:
            CheckpointError: its file was damaged or removed since it was opened.
        """
        if name in self.parts:
            file, part = self.parts[name]
            return read_state_file(file)[name.removeprefix(f"{part}.")]
        path, key = self.places[name]
        stored = _read(path, key)
        if self.renamed:
            stored = from_upstream({key: stored})[name]
        return stored[self.rows.get(name, slice(None))]

    def read_finite(self, name: str) -> Tensor:
        """Return a tensor by our name, as stored.

        Raises:
            CheckpointError: as `copy_to`.
        """
        return _finite(self.read(name), name, self._file(name))

    def copy_to(self, name: str, target: Tensor) -> None:
        """Write a tensor into one of its shape, converted, a block of rows in memory at a time.

        Raises:
            CheckpointError: as `read`, or a number is NaN or infinite.
        """
        path, key = self.places.get(name, (None, name))
        stored = () if path is None else _shape(path, key)
        taken = range(*self.rows.get(name, slice(None)).indices(stored[0])) if stored else range(0)
        if path is None or not target.ndim or (len(taken), *stored[1:]) != tuple(target.shape):
            target.copy_(self.read_finite(name))
            return
        step = max(1, _BLOCK_BYTES // (4 * max(1, target[0].numel())))
        for start in range(0, len(target), step):
            stop = min(start + step, len(target))
            rows = _read(path, key, slice(taken.start + start, taken.start + stop))
            target[start:stop] = _finite(rows, name, path)

    def require_finite(self) -> None:
        """Look at every number, one tensor in memory at a time.

        Raises:
            CheckpointError: as `copy_to`.
        """
        for name in self.shapes:
            self.read_finite(name)

    def _file(self, name: str) -> Path:
        return (self.parts if name in self.parts else self.places)[name][0]


def open_body(checkpoint: Path) -> CheckpointWeights:
    """Find every tensor of `model.safetensors` or its shards.

    Raises:
        CheckpointError: no weights, a missing or truncated file, quantized, or an adapter's.
    """
    shapes: dict[str, Tensor] = {}
    places: dict[str, tuple[Path, str]] = {}
    for path, key, tensor in stored_tensors(checkpoint):
        for name, piece in from_upstream({key: tensor}).items():
            shapes[name], places[name] = piece, (path, key)
    return CheckpointWeights(shapes, places)


def stored_tensors(checkpoint: Path) -> list[tuple[Path, str, Tensor]]:
    """Return file, upstream key and shape of every tensor in `model.safetensors` or its shards.

    Raises:
        CheckpointError: no weights, a missing or truncated file, quantized, or an adapter's.
    """
    return [
        (stored.path, stored.key, torch.empty(stored.shape, device="meta"))
        for stored in stored_headers(checkpoint)
    ]


def _finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{path}: {name} has weights that are NaN or infinite; the training diverged or the "
            "file is damaged, name another step"
        )
    return tensor


def _read(path: Path, key: str, rows: slice = slice(None)) -> Tensor:
    try:
        # Opened for these rows alone: an open file keeps every page that was read mapped.
        with safe_open(path, framework="pt") as file:
            whole = rows == slice(None)
            tensor: Tensor = file.get_tensor(key) if whole else file.get_slice(key)[rows]
    except (SafetensorError, OSError) as error:
        raise incomplete(path, error) from error
    return tensor


def _shape(path: Path, key: str) -> tuple[int, ...]:
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise incomplete(path, error) from error


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

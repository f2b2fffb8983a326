"""The tensors of a checkpoint under this project's names, each read on demand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qvla_export.policies.adapters import adapter_file, settings_file
from qvla_export.policies.low_rank import Factors, read_settings, require_fitting, split_keys
from qvla_export.policies.prismatic.files import (
    StoredTensor,
    file_headers,
    incomplete,
    stored_headers,
)
from qvla_export.policies.prismatic.keys import from_upstream
from qvla_export.policies.prismatic.pretrained import TowerChoice, read_tower, tower_key
from qvla_export.policies.prismatic.state_files import read_state_file, require_undamaged
from qvla_export.shared.errors import CheckpointError

# Of a file, mapped at once while a tensor is converted.
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class LowRankChange:
    """What an adapter adds to one stored weight."""

    file: Path
    factors: Factors
    scale: float

    def added_to(self, stored: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return W + scale B A, computed in float32, in the type of the stored rows."""
        a, b = _read(self.file, self.factors.a), _read(self.file, self.factors.b, rows)
        return (stored.float() + self.scale * (b.float() @ a.float())).to(stored.dtype)


@dataclass(frozen=True)
class CheckpointWeights:
    """Where each tensor of a checkpoint lies; holds none of their numbers."""

    # Our name -> the tensor without its numbers (device "meta").
    shapes: Mapping[str, Tensor]
    # Our name -> file and the key in it.
    places: Mapping[str, tuple[Path, str]]
    # Our name -> upstream's key of the tensor, where it is stored under another one.
    upstream: Mapping[str, str] = field(default_factory=dict)
    # Our name -> the rows that are read, where not all are; `shapes` has these alone.
    rows: Mapping[str, slice] = field(default_factory=dict)
    # False where a stored tensor is one of ours as it is, whatever it is called.
    renamed: bool = True
    # Upstream's key -> what an adapter adds to the tensor.
    changes: Mapping[str, LowRankChange] = field(default_factory=dict)

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
            CheckpointError: as `open_state_file`.
        """
        return self.with_others(open_state_file(file, lambda key: f"{part}.{key}"))

    def with_others(self, other: "CheckpointWeights") -> "CheckpointWeights":
        """Return these weights and others, which go first."""
        return replace(
            self,
            shapes={**self.shapes, **other.shapes},
            places={**self.places, **other.places},
            upstream={**self.upstream, **other.upstream},
            changes={**self.changes, **other.changes},
        )

    def read(self, name: str) -> Tensor:
        """Return a tensor by our name, as stored, with what an adapter adds.

        Raises:
            CheckpointError: its file was damaged or removed since it was opened.
        """
        path, stored = self.places[name]
        key, tensor = self.upstream.get(name, stored), _read(path, stored)
        if key in self.changes:
            tensor = self.changes[key].added_to(tensor)
        if self.renamed:
            tensor = from_upstream({key: tensor})[name]
        return tensor[self.rows.get(name, slice(None))]

    def read_finite(self, name: str) -> Tensor:
        """Return a tensor by our name, as stored.

        Raises:
            CheckpointError: as `copy_to`.
        """
        return _finite(self.read(name), name, self.places[name][0])

    def copy_to(self, name: str, target: Tensor) -> None:
        """Write a tensor into one of its shape, converted, a block of rows in memory at a time.

        Raises:
            CheckpointError: as `read`, or a number is NaN or infinite.
        """
        path, stored = self.places[name]
        key = self.upstream.get(name, stored)
        shape = _shape(path, stored) if path.suffix == ".safetensors" else ()
        taken = range(*self.rows.get(name, slice(None)).indices(shape[0])) if shape else range(0)
        if not shape or not target.ndim or (len(taken), *shape[1:]) != tuple(target.shape):
            target.copy_(self.read_finite(name))
            return
        step = max(1, _BLOCK_BYTES // (4 * max(1, target[0].numel())))
        for start in range(0, len(target), step):
            stop = min(start + step, len(target))
            place = slice(taken.start + start, taken.start + stop)
            rows = _read(path, stored, place)
            if key in self.changes:
                rows = self.changes[key].added_to(rows, place)
            target[start:stop] = _finite(rows, name, path)

    def require_finite(self) -> None:
        """Look at every number, one tensor in memory at a time.

        Raises:
            CheckpointError: as `copy_to`.
        """
        for name in self.shapes:
            self.read_finite(name)


def open_body(checkpoint: Path) -> CheckpointWeights:
    """Find every tensor of `model.safetensors` or its shards, with what adapters add to them.

    Raises:
        CheckpointError: no weights, a missing or truncated file, quantized, or an adapter that
            cannot be merged.
    """
    stored = {tensor.key: tensor for tensor in stored_headers(checkpoint, low_rank=True)}
    keys = split_keys(stored, checkpoint)
    sizes = {key: stored[place].shape for key, place in keys.weights.items()}
    shapes: dict[str, Tensor] = {}
    places: dict[str, tuple[Path, str]] = {}
    upstream: dict[str, str] = {}
    for key, place in keys.weights.items():
        tensor = torch.empty(sizes[key], device="meta")
        for name, piece in from_upstream({key: tensor}).items():
            shapes[name], places[name], upstream[name] = piece, (stored[place].path, place), key
    changes: dict[str, LowRankChange] = {}
    if keys.factors:
        found = {key: (stored[pair.a], stored[pair.b]) for key, pair in keys.factors.items()}
        changes = _changes(checkpoint, settings_file(checkpoint), sizes, found)
    if adapter := adapter_file(checkpoint):
        loose = {tensor.key: tensor for tensor in file_headers(adapter)}
        pairs = split_keys(loose, adapter)
        if pairs.weights:
            raise CheckpointError(
                f"{adapter} stores {sorted(pairs.weights.values())[0]}, which is no low-rank "
                "factor; merge it with peft's merge_and_unload and name the merged folder"
            )
        found = {key: (loose[pair.a], loose[pair.b]) for key, pair in pairs.factors.items()}
        changes |= _changes(adapter, adapter.with_name("adapter_config.json"), sizes, found)
    return CheckpointWeights(shapes, places, upstream, changes=changes)


def _changes(
    place: Path,
    settings: Path | None,
    sizes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[StoredTensor, StoredTensor]],
) -> dict[str, LowRankChange]:
    """Return what factors A and B add to the weights of these sizes, by upstream's keys.

    Raises:
        CheckpointError: they are of no weight that is there, of other sizes, or nothing says the
            alpha that they are multiplied by.
    """
    if settings is None:
        raise CheckpointError(
            f"{place} stores low-rank factors, and no adapter_config.json says their lora_alpha; "
            "bring the file, or merge them with peft's merge_and_unload"
        )
    said = read_settings(settings)
    changes = {}
    for key, (a, b) in found.items():
        require_fitting(place, key, sizes.get(key), (a.shape, b.shape))
        changes[key] = LowRankChange(a.path, Factors(a.key, b.key), said.scale(a.shape[0]))
    return changes


def open_state_file(
    file: Path,
    upstream: Callable[[str], str],
    scale: Callable[[int], float] | None = None,
) -> CheckpointWeights:
    """Find every tensor of a part's own file.

    Args:
        file: a state dict that torch saved.
        upstream: key in the file -> what upstream calls the tensor.
        scale: rank of low-rank factors -> what their product is multiplied by; None where there
            may be none.

    Raises:
        CheckpointError: as `require_undamaged` and `read_state_file`, or of an adapter that cannot
            be merged.
    """
    require_undamaged(file)
    state = read_state_file(file)
    keys = split_keys(state, file)
    if keys.factors and scale is None:
        raise CheckpointError(f"{file} stores low-rank factors, of which nothing says the scale")
    shapes: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    places: dict[str, tuple[Path, str]] = {}
    for key, stored in keys.weights.items():
        known = upstream(key)
        for name, piece in from_upstream({known: state[stored].to("meta")}).items():
            shapes[name], places[name], names[name] = piece, (file, stored), known
    changes = {}
    for key, factors in keys.factors.items():
        a, b = tuple(state[factors.a].shape), tuple(state[factors.b].shape)
        weight = keys.weights.get(key)
        size = None if weight is None else tuple(state[weight].shape)
        require_fitting(file, key, size, (a, b))
        assert scale is not None
        changes[upstream(key)] = LowRankChange(file, factors, scale(a[0]))
    return CheckpointWeights(shapes, places, names, changes=changes)


def open_pretrained(choice: TowerChoice) -> CheckpointWeights:
    """Find every tensor that a checkpoint leaves to the file of a pretrained tower.

    Raises:
        CheckpointError: as `PretrainedTower.path`.
    """
    path = choice.tower.path()
    shapes = {name: tensor.to("meta") for name, tensor in choice.tensors().items()}
    places = {name: (path, tower_key(name)) for name in shapes}
    return CheckpointWeights(shapes, places, upstream={name: name for name in shapes})


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
    if path.suffix == ".onnx":
        return read_tower(path)[key][rows]
    if path.suffix != ".safetensors":
        return read_state_file(path)[key][rows]
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

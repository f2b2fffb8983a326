"""HDF5 of unknown origin: what lies in the file itself, a row at a time, within bounds."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from calibration.sources.hdf5.hdf5_heaps import require_sound_heaps
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.git_lfs import refuse_pointer

# What h5py raises over damaged bytes, depending on where they are.
_DAMAGED = (
    OSError,
    KeyError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    NotImplementedError,
)
# Of one row, and of a chunk that is unpacked for it.
_MOST_ROW_BYTES = 256 << 20
_MOST_CHUNK_BYTES = 1 << 30
_MOST_ROWS = 100_000_000
_MOST_ATTRIBUTE_BYTES = 16 << 20
_MOST_MEMBERS = 1_000_000
# Filters that HDF5 brings itself; others are programs that a file asks to load.
_FILTERS = {"gzip", "lzf", "szip", "shuffle", "fletcher32", "scaleoffset"}


class Hdf5File:
    """An open file.

    Raises:
        ArtifactError: from all methods: the file is missing, damaged or beyond the bounds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading(""):
            self._file = h5py.File(path, "r", locking=False)

    def close(self) -> None:
        """Close it."""
        with contextlib.suppress(*_DAMAGED):
            self._file.close()

    def members(self, group: str) -> list[str]:
        """Return the names in a group, sorted; empty where there is no such group."""
        with self._reading(group):
            node = self._object(group)
            if not isinstance(node, h5py.Group):
                return []
            if len(node) > _MOST_MEMBERS:
                raise ValueError(f"{len(node)} members, at most {_MOST_MEMBERS} are read")
            return sorted(str(name) for name in node)

    def is_array(self, name: str) -> bool:
        """Whether there is an array of this name."""
        with self._reading(name):
            return isinstance(self._object(name), h5py.Dataset)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return an array's shape."""
        with self._reading(name):
            return tuple(int(side) for side in self._array(name).shape)

    def row(self, name: str, number: int) -> Any:
        """Return one row of an array: numbers, or the bytes of a file."""
        with self._reading(name):
            array = self._array(name)
            if not 0 <= number < array.shape[0]:
                raise ValueError(f"no row {number} of {array.shape[0]}")
            if array.dtype.hasobject:
                require_sound_heaps(self.path)
            value = array[number]
            return value.tobytes() if _is_bytes(array.dtype) and array.ndim == 1 else value

    def text(self, name: str) -> str | None:
        """Return an attribute "group@name", or an array of one text; None where there is none."""
        group, at, attribute = name.partition("@")
        with self._reading(name):
            require_sound_heaps(self.path)
            node = self._object(group)
            if at:
                if node is None or attribute not in node.attrs:
                    return None
                handle = h5py.h5a.open(node.id, attribute.encode())
                if handle.get_storage_size() > _MOST_ATTRIBUTE_BYTES or handle.shape not in (
                    (),
                    (1,),
                ):
                    raise ValueError(f"an attribute of shape {handle.shape} is no text")
                value = node.attrs[attribute]
            elif isinstance(node, h5py.Dataset) and math.prod(self._array(group).shape) == 1:
                value = node[()]
            else:
                return None
            value = value.reshape(-1)[0] if isinstance(value, np.ndarray) else value
            return value.decode() if isinstance(value, bytes) else str(value)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except ArtifactError:
            raise
        except FileNotFoundError:
            raise ArtifactError(f"a file of the dataset is missing: {self.path}") from None
        except _DAMAGED as error:
            refuse_pointer(self.path)
            place = f"{self.path}, {name}" if name else str(self.path)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ArtifactError(
                f"{place} cannot be read as HDF5: {reason}; copy the file again"
            ) from None

    def _object(self, name: str) -> Any:
        """Return what a path leads to; None where it leads nowhere."""
        node: Any = self._file
        for part in filter(None, name.split("/")):
            if not isinstance(node, h5py.Group) or part not in node:
                return None
            link = node.get(part, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ArtifactError(
                    f"{self.path}, {name}: {part} is a link, to elsewhere or by name, which is not "
                    "followed; write the file with its data inside: h5repack --merge"
                )
            node = node[part]
        return node

    def _array(self, name: str) -> Any:
        """Return an array that is safe to read a row of."""
        array = self._object(name)
        if not isinstance(array, h5py.Dataset):
            raise ArtifactError(
                f"{self.path} has no array {name}, which is read of all files and episodes; leave "
                "those out that lack it, or name others with --camera, --state-column"
            )
        if array.is_virtual or array.external:
            raise ArtifactError(
                f"{self.path}, {name}: its data lie in other files, which is not followed; write "
                "the file with its data inside"
            )
        kind, size = array.dtype.kind, array.dtype.itemsize
        plain = kind in "fiubS" or h5py.check_string_dtype(array.dtype) is not None
        if not plain and not _is_bytes(array.dtype):
            raise ValueError(f"numbers, bytes or texts are read, this is {array.dtype}")
        chunk = math.prod(array.chunks) * size if array.chunks else 0
        row = math.prod(array.shape[1:]) * size
        rows = array.shape[0] if array.ndim else 1
        if row > _MOST_ROW_BYTES or chunk > _MOST_CHUNK_BYTES or rows > _MOST_ROWS:
            raise ValueError(f"an array {list(array.shape)} in chunks of {chunk:,} bytes")
        if others := {str(f) for f in array._filters} - _FILTERS:
            raise ValueError(f"compressed by {', '.join(others)}, which HDF5 does not bring")
        return array


def _is_bytes(dtype: Any) -> bool:
    return bool(h5py.check_vlen_dtype(dtype) == np.dtype(np.uint8))

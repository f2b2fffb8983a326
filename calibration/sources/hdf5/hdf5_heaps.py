"""Global heaps of an HDF5 file, where texts and bytes of any length lie, looked through beforehand.

HDF5 2.0.0 walks a heap whose objects do not advance for ever. Source: HDF5 File Format
Specification, III.E, with lengths of 8 bytes.
"""

import mmap
from functools import lru_cache
from pathlib import Path

# Signature, version 1 and the reserved bytes.
_HEAD = b"GCOL\x01\x00\x00\x00"
_HEAD_BYTES = 16
_OBJECT_BYTES = 16


def require_sound_heaps(path: Path) -> None:
    """Look whether all heaps of a file can be walked; a file is looked through once.

    Raises:
        ValueError: one cannot.
        OSError: the file cannot be read.
    """
    stat = path.stat()
    if at := _wrong_heap(path, stat.st_size, stat.st_mtime_ns):
        raise ValueError(f"the heap of texts at byte {at} is damaged")


@lru_cache(maxsize=1024)
def _wrong_heap(path: Path, size: int, _changed_ns: int) -> int:
    """Return where the first heap lies whose objects do not follow each other; 0 for none."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_HEAD)
        while at >= 0:
            stop = at + int.from_bytes(data[at + 8 : at + _HEAD_BYTES], "little")
            if not at + _HEAD_BYTES <= stop <= size or not _is_walkable(data, at, stop):
                return at
            at = data.find(_HEAD, at + 1)
    return 0


def _is_walkable(data: mmap.mmap, at: int, stop: int) -> bool:
    at += _HEAD_BYTES
    while at + _OBJECT_BYTES <= stop:
        length = int.from_bytes(data[at + 8 : at + _OBJECT_BYTES], "little")
        is_free = data[at : at + 2] == b"\0\0"
        # Free space counts its own head; objects are padded to 8 bytes.
        step = length if is_free else _OBJECT_BYTES + (length + 7) // 8 * 8
        if step < _OBJECT_BYTES or at + step > stop:
            return False
        at += step
    return True

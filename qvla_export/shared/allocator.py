"""What the C library keeps of freed memory, and how it is given back; of glibc alone, mallopt(3).

Each thread has a heap of its own there, up to eight a core; and a large block is mapped by itself,
and so given back, only until a block of its size was freed once: from then on its like, up to
32 MiB, are of a heap, which keeps as much again.
"""

import ctypes
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_HEAPS = 2
# Larger blocks are mapped by themselves, and no more than this is kept at the end of a heap.
_KEPT_BYTES = 1 << 20


def return_freed_memory() -> None:
    """Give what was freed back to the system; does nothing where the C library cannot."""
    if (library := _library("malloc_trim")) is not None:
        library.malloc_trim(0)


def bound_freed_memory() -> bool:
    """Keep little of what is freed from now on, for a process that serves for days.

    To be called before threads begin: heaps that are there stay. Not for a process that computes
    with large arrays all the time, which would be mapped and cleared anew each time.

    Returns:
        Whether the C library takes such settings.
    """
    library = _library("mallopt")
    if library is None:
        return False
    settings = (
        (_ARENA_MAX, _HEAPS),
        (_MMAP_THRESHOLD, _KEPT_BYTES),
        (_TRIM_THRESHOLD, _KEPT_BYTES),
    )
    return all(library.mallopt(name, value) == 1 for name, value in settings)


def _library(function: str) -> Any:
    """Return the C library where it has a function, which musl's and other systems' lack."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, function) else None

"""Peak resident memory of a block of code in this process; Linux."""

import contextlib
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

from qvla_export.shared.allocator import return_freed_memory

_STATUS = Path("/proc/self/status")
_SYSTEM = Path("/proc/meminfo")
_RESET = Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes by which the block raised the process's resident memory at its peak."""

    # None until the block has ended, and where the system does not tell.
    extra_bytes: int | None = None


@contextlib.contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the block: the kernel's own high-water mark, set back at its start."""
    found = PeakMemory()
    before = None
    # What was freed before the block must not hide what the block takes.
    gc.collect()
    return_freed_memory()
    with contextlib.suppress(OSError):
        _RESET.write_text("5")
        before = _bytes_of(_STATUS, "VmRSS")
    yield found
    if before is not None:
        peak = _bytes_of(_STATUS, "VmHWM")
        found.extra_bytes = None if peak is None else max(0, peak - before)


def high_water_bytes() -> int:
    """Return the largest resident memory this process had since its program began.

    `ru_maxrss` also counts what the process had that started it; it stands in where the system does
    not tell more.
    """
    found = None
    with contextlib.suppress(OSError):
        found = _bytes_of(_STATUS, "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if found is None else found


def available_bytes() -> int | None:
    """Return what the system can still give without swapping; None where it does not tell."""
    with contextlib.suppress(OSError):
        return _bytes_of(_SYSTEM, "MemAvailable")
    return None


def _bytes_of(table: Path, field: str) -> int | None:
    for line in table.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None

"""Peak resident memory of a block of code in this process; Linux."""

import contextlib
import gc
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qvla_export.shared.allocator import return_freed_memory

_STATUS = Path("/proc/self/status")
_SYSTEM = Path("/proc/meminfo")
_RESET = Path("/proc/self/clear_refs")


@dataclass(eq=False)
class PeakMemory:
    """The process's resident memory at its highest while a block runs, in bytes."""

    # None where the system does not tell, and at first.
    peak_bytes: int | None = None
    # By which the block raised what was there when it began.
    extra_bytes: int | None = None

    def so_far_bytes(self) -> int | None:
        """Return the peak until now, of a block that has not ended."""
        _note_high_water()
        return self.peak_bytes


# The kernel keeps one high-water mark a process: whoever sets it back tells the blocks that are
# open, and its highest is kept for `high_water_bytes`.
_OPEN: list[PeakMemory] = []
_PROCESS = PeakMemory()


@contextlib.contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the block: the kernel's own high-water mark, set back at its start. Blocks may nest.

    Threads of this process count, its children do not.
    """
    found = PeakMemory()
    before: int | None = None
    # What was freed before the block must not hide what the block takes.
    there = resident_bytes()
    with contextlib.suppress(OSError):
        _note_high_water()
        _RESET.write_text("5")
        before = there
    _OPEN.append(found)
    try:
        yield found
    finally:
        _note_high_water()
        _OPEN.remove(found)
        if before is None:
            found.peak_bytes = None
        elif found.peak_bytes is not None:
            found.extra_bytes = max(0, found.peak_bytes - before)


def high_water_bytes() -> int:
    """Return the largest resident memory this process had since its program began.

    `ru_maxrss` also counts what the process had that started it; it stands in where the system does
    not tell more.
    """
    _note_high_water()
    found = _PROCESS.peak_bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if found is None else found


def _note_high_water() -> None:
    """Tell the process and all open blocks of the kernel's mark as it stands."""
    with contextlib.suppress(OSError):
        if (mark := _bytes_of(_STATUS, "VmHWM")) is not None:
            for peak in (_PROCESS, *_OPEN):
                peak.peak_bytes = max(mark, peak.peak_bytes or 0)


def resident_bytes() -> int | None:
    """Return what this process has in memory, less what it freed; None where nobody tells."""
    gc.collect()
    return_freed_memory()
    with contextlib.suppress(OSError):
        return _bytes_of(_STATUS, "VmRSS")
    return None


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

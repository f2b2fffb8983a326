"""What each artifact of a run was made from and what it cost: finished work is not thrown away.

A stage that is about to make an artifact says from which options. Where an earlier artifact, and
all that was made of it, took more than a minute of CPU, a changed option is refused unless the run
folder is opened with `force`; cheaper work is replaced, and the log says what was.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.measurement.peak_memory import peak_memory
from qvla_export.pipeline.progress import OnProgress, Progress
from qvla_export.pipeline.run_folder import RECORD_SUFFIX, RunFolder, record_file
from qvla_export.shared.artifacts import read_json, write_bytes, write_json
from qvla_export.shared.errors import ArtifactError, FinishedWork, QvlaError

if TYPE_CHECKING:
    from qvla_export.measurement.distributed import World

_LOG = logging.getLogger(__name__)
_FORMAT = "qvla.work/1"
# Work that took longer is replaced on demand only.
CHEAP_CPU_S = 60.0
# Seconds of CPU between two notes of a long stage: what a kill forgets at most.
_NOTE_EVERY_S = 5.0
# An option's value as a person reads it.
Value = str | int | float | bool | None
# An option that was not recorded, as opposed to one that was None.
_UNKNOWN = "not recorded"


@dataclass(frozen=True)
class ArtifactWork:
    """What an artifact is made from: the words of its record."""

    run: RunFolder
    # The artifact, below the run's root.
    path: Path
    # As the command line spells them where it does: {"--probes": 4, "calibration set": "9f3c"}.
    options: Mapping[str, Value]
    # Artifacts of the run that it is made of: those it is discarded with.
    sources: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """Return the artifact's path below the run's root."""
        return self.path.relative_to(self.run.root).as_posix()

    @property
    def record(self) -> Path:
        """Return the file of its record, beside it."""
        return record_file(self.path)


@dataclass(frozen=True)
class _Record:
    """What is known of an artifact's making."""

    name: str
    options: Mapping[str, Value]
    sources: tuple[str, ...]
    cpu_s: float
    # The process's resident memory at its highest meanwhile; None where the system did not tell.
    peak_bytes: int | None = None


def short(digest: str) -> str:
    """Return the start of a digest, as records and messages have it."""
    return digest[:12]


def cpu_s(run: RunFolder, path: Path) -> float | None:
    """Return the CPU seconds that an artifact of a run took; None where they were not recorded."""
    earlier = _read(ArtifactWork(run, path, {}).record)
    return None if earlier is None else earlier.cpu_s


def peak_bytes(run: RunFolder, path: Path) -> int | None:
    """Return the resident memory at its highest while an artifact was made; None as for `cpu_s`."""
    earlier = _read(ArtifactWork(run, path, {}).record)
    return None if earlier is None else earlier.peak_bytes


@contextmanager
def recorded_work(
    work: ArtifactWork,
    on_progress: OnProgress,
    world: "World | None" = None,
    cpu_now_s: Callable[[], float] | None = None,
) -> Iterator[OnProgress]:
    """Run a block that makes an artifact, and record the CPU seconds and memory it takes.

    An interrupted block's seconds are noted as it goes on, and those of the next one are added; of
    the resident memory the highest counts.

    Args:
        work: what is made of what.
        on_progress: hears what the block's own listener, which is yielded, hears.
        world: processes that make it together; all call this, and process 0 keeps the record.
        cpu_now_s: clock of this process and its children; None for the system's.

    Raises:
        FinishedWork: the block would replace work that took more than a minute.
    """
    # Process 0 decides, so that none waits for one that was refused.
    refusal = _refusal(work) if world is None or world.rank == 0 else None
    if world is not None:
        refusal = world.broadcast(refusal)
    if refusal:
        raise FinishedWork(refusal)
    if world is not None and world.rank:
        yield on_progress
        return
    now_s = cpu_now_s or _cpu_now_s
    earlier = _read(work.record)
    same = earlier is not None and not _changes(earlier, work)
    before = earlier if earlier is not None and same else _Record(work.name, {}, (), 0.0)
    began_s, noted_s, was = now_s(), 0.0, _records_before(work, same)

    def note() -> None:
        nonlocal noted_s
        noted_s = now_s() - began_s
        _write(work, before, noted_s, memory.so_far_bytes())

    def hear(progress: Progress) -> None:
        if now_s() - began_s - noted_s > _NOTE_EVERY_S:
            note()
        on_progress(progress)

    # Before the block: whoever is killed once the artifact stands leaves its record with it.
    _write(work, before)
    for path in was:
        if path != work.record:
            path.unlink(missing_ok=True)
    with peak_memory() as memory:
        try:
            yield hear
        except QvlaError:
            if noted_s:
                note()
            else:
                # Refused before it began: what was there, and its records, are as they were.
                _restore(work, was)
            raise
        except BaseException:
            note()
            raise
        note()


def _records_before(work: ArtifactWork, same: bool) -> dict[Path, bytes]:
    """Return the record's bytes, and those of what will be out of date: replaced without a word."""
    of_it = [] if same else [replace(work, path=work.run.root / r.name) for r in _dependents(work)]
    files = [work.record, *(dependent.record for dependent in of_it)]
    return {path: path.read_bytes() for path in files if path.is_file()}


def _restore(work: ArtifactWork, was: Mapping[Path, bytes]) -> None:
    if work.record not in was:
        work.record.unlink(missing_ok=True)
    for path, content in was.items():
        write_bytes(path, content)


def _refusal(work: ArtifactWork) -> str | None:
    """Say why an artifact must not be replaced; where it may be, log what goes and return None."""
    earlier = _read(work.record)
    changes = [] if earlier is None else _changes(earlier, work)
    if earlier is None or not changes:
        return None
    text = ", ".join(f"{name} was {old}, is now {new}" for name, old, new in changes)
    of_it = _dependents(work)
    lost_s = earlier.cpu_s + sum(record.cpu_s for record in of_it)
    beside = f" with what was made of it ({', '.join(r.name for r in of_it)})" if of_it else ""
    if lost_s > CHEAP_CPU_S and not work.run.force:
        return (
            f"{work.name}{beside} took {lost_s:.0f} CPU seconds and would be thrown away: {text}. "
            "Keep the old value, name another run folder with --run, or replace it with --force"
        )
    if work.path.exists():
        _LOG.info("%s%s is replaced (%.0f CPU seconds): %s", work.name, beside, lost_s, text)
    return None


def _changes(earlier: _Record, work: ArtifactWork) -> list[tuple[str, Value, Value]]:
    """Name, old and new value of the options that differ."""
    return [
        (name, earlier.options.get(name, _UNKNOWN), value)
        for name, value in work.options.items()
        if earlier.options.get(name, _UNKNOWN) != value
    ]


def _dependents(work: ArtifactWork) -> list[_Record]:
    """Records of all that was made of an artifact, and of what was made of that."""
    files = sorted(work.run.root.rglob(f"*{RECORD_SUFFIX}"))
    records = [record for record in map(_read, files) if record is not None]
    names, found = {work.name}, list[_Record]()
    while more := [r for r in records if r not in found and names & {*r.sources}]:
        found += more
        names |= {record.name for record in more}
    return [record for record in found if record.name != work.name]


def _write(
    work: ArtifactWork, before: _Record, cpu_s: float = 0.0, peak_bytes: int | None = None
) -> None:
    """Write a record of what was done before and of what was done since."""
    peaks = [peak for peak in (before.peak_bytes, peak_bytes) if peak is not None]
    write_json(
        work.record,
        {
            "format": _FORMAT,
            "artifact": work.name,
            "options": dict(work.options),
            "sources": [path.relative_to(work.run.root).as_posix() for path in work.sources],
            "cpu_s": round(before.cpu_s + cpu_s, 3),
            "peak_bytes": max(peaks, default=None),
        },
    )


def _read(path: Path) -> _Record | None:
    """Return a record; None where there is none, or none that can be read."""
    if not path.is_file():
        return None
    try:
        value: Any = read_json(path, "record of work")
        if value["format"] != _FORMAT:
            return None
        sources = tuple(map(str, value["sources"]))
        # Records of earlier versions say nothing of memory.
        peak = value.get("peak_bytes")
        return _Record(
            str(value["artifact"]),
            dict(value["options"]),
            sources,
            float(value["cpu_s"]),
            None if peak is None else int(peak),
        )
    except (ArtifactError, KeyError, TypeError, ValueError) as error:
        _LOG.warning("%s is left out: %s", path, error)
        return None


def _cpu_now_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system

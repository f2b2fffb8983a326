"""Sums over units of work, shared among processes and kept on disk as they grow.

A unit is a number; its addends depend on nothing but it. Each process adds some of the units and
writes its own journal: the sums so far and the units in them. Whoever starts again, alone or with
any number of others, finds the journals, merges them and shares out what is left.

Why a kill at any moment neither counts a unit twice nor loses one that was marked: a journal is
replaced whole, so it always holds the sums of just the units it names. Process 0 alone merges,
before anyone writes, and puts the merged journal in place before it removes what went into it. A
journal whose units overlap with those merged so far is therefore one of these (or was written by a
process that outlived its run), and is left out; then its other units are only done again.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.measurement.distributed import Alone, World
from qvla_export.shared.artifacts import remove_leftovers
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.tensor_files import StoredTensors, open_tensor_file, write_tensor_file

_FORMAT = "qvla-progress-2"
_log = logging.getLogger(__name__)

# Called with (work done, work in all); the unit of work is the caller's.
OnProgress = Callable[[int, int], None]


class ShardedSums:
    """This process's share of the sums, and the journal that survives it."""

    def __init__(
        self,
        empty: Mapping[str, NDArray[np.float64]],
        identity: Mapping[str, Any],
        journal: Path | None = None,
        world: World | None = None,
    ) -> None:
        """Find what earlier processes have done; all processes of the world call this together.

        Args:
            empty: zeros, one array a name.
            identity: what must be equal for journals to be of the same sums; JSON.
            journal: process 0's file, the others' lie beside it; None keeps nothing.
            world: the processes that share the work; None for this one alone.
        """
        self.world: World = world or Alone()
        self._identity = json.loads(json.dumps(identity))
        self._journal = journal
        # Name -> this process's sum, to be added to in place.
        self.values = {name: array.copy() for name, array in empty.items()}
        merged: set[int] = set()
        if self.world.rank == 0 and journal is not None:
            merged = self._merge(journal)
        self._own = set(merged)
        # Units that were done before this start; the same for all processes.
        self.resumed: frozenset[int] = frozenset(self.world.broadcast(sorted(merged)))

    def share(self, units: Sequence[int]) -> list[int]:
        """Return those of the units that this process has to add."""
        left = [unit for unit in units if unit not in self.resumed]
        return left[self.world.rank :: self.world.size]

    def mark(self, unit: int) -> None:
        """Keep the sums on disk: `unit` is in them now, whole."""
        self._own.add(unit)
        if self._journal is not None:
            self._write(_shard_file(self._journal, self.world.rank))

    def done(self, units: Iterable[int]) -> int:
        """Count those of the units that are known to be done; others' shares are presumed so."""
        wanted = list(units)
        before = sum(unit in self.resumed for unit in wanted)
        own = sum(unit in self._own and unit not in self.resumed for unit in wanted)
        return min(len(wanted), before + own * self.world.size)

    def total(self) -> dict[str, NDArray[np.float64]]:
        """Return the sums over all processes; all call this together."""
        return self.world.all_reduce_sum(self.values)

    def _write(self, path: Path) -> None:
        provenance = {"format": _FORMAT, "of": self._identity, "units": sorted(self._own)}
        write_tensor_file(path, self.values, provenance)

    def _merge(self, journal: Path) -> set[int]:
        """Add up the journals of this very measurement, write one of them all, remove the rest."""
        done: set[int] = set()
        _remove_unfinished(journal)
        found = [(self._read(path), path) for path in journal_files(journal)]
        # The merged journal is the fullest of those that were to be removed after it.
        found.sort(key=lambda pair: -len(pair[0][1]) if pair[0] else 0)
        for content, _ in found:
            if content is not None and not done & content[1]:
                done |= content[1]
                for name, array in content[0].items():
                    self.values[name] += array
        self._own = done
        if done and [path for _, path in found] != [journal]:
            self._write(journal)
        for _, path in found:
            if path != journal or not done:
                path.unlink(missing_ok=True)
        return done

    def _read(self, path: Path) -> tuple[StoredTensors, set[int]] | None:
        try:
            tensors, saved = open_tensor_file(path, _FORMAT, "progress")
        except ArtifactError as error:
            _log.warning("starting anew: %s", error)
            return None
        if saved.get("of") != self._identity:
            _log.warning("%s is of another measurement; starting anew", path)
            return None
        if {k: tensors.shape(k) for k in tensors} != {k: v.shape for k, v in self.values.items()}:
            _log.warning("%s holds other sums; starting anew", path)
            return None
        return tensors, set(saved["units"])


def journal_files(journal: Path) -> list[Path]:
    """Return the journals that lie on disk: process 0's and those of the others beside it."""
    if not journal.parent.is_dir():
        return []
    others = sorted(path for path in journal.parent.iterdir() if _is_shard(path.name, journal.name))
    return [path for path in (journal, *others) if path.is_file()]


def remove_journals(journal: Path) -> None:
    """Remove every process's journal, once the result is safe."""
    _remove_unfinished(journal)
    for path in journal_files(journal):
        path.unlink(missing_ok=True)


def _remove_unfinished(journal: Path) -> None:
    """Remove what processes that were killed while they wrote a journal left beside it."""
    if journal.parent.is_dir():
        ranks = {
            entry.name.removeprefix(f".{journal.name}.").partition(".")[0]
            for entry in journal.parent.iterdir()
            if entry.name.startswith(f".{journal.name}.")
        }
        for rank in (int(rank) for rank in ranks if rank.isdigit()):
            remove_leftovers(_shard_file(journal, rank))
        remove_leftovers(journal)


def _is_shard(name: str, journal: str) -> bool:
    return name.startswith(f"{journal}.") and name.removeprefix(f"{journal}.").isdigit()


def _shard_file(journal: Path, rank: int) -> Path:
    return journal if rank == 0 else journal.with_name(f"{journal.name}.{rank}")

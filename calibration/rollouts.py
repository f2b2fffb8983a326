"""Closed-loop rollouts: success with an interval, action deviation along episodes, controls."""

import atexit
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import Progress

from calibration.simulator import CAMERA, Simulator
from calibration.tasks import find_task, scene_siblings
from qvla_export.action import ActionPolicy
from qvla_export.artifacts import (
    read_json,
    require_fields,
    versions,
    write_bytes,
    write_json,
)
from qvla_export.errors import ArtifactError, ArtifactMismatch, QvlaError
from qvla_export.observation import Observation

_LOG = logging.getLogger(__name__)

Control = Literal["none", "blank-image", "wrong-instruction"]
CONTROLS: tuple[Control, ...] = ("none", "blank-image", "wrong-instruction")
# Makes a policy inside a worker process; must be picklable.
PolicyFactory = Callable[[], ActionPolicy]
_BLANK = 127


@dataclass(frozen=True)
class RolloutConfig:
    """Which episodes are run and how chunks are executed."""

    tasks: tuple[str, ...]
    episodes: int
    # First episode seed; the same seed gives the same scene to every policy.
    seed: int = 1_000_000
    # Actions of a chunk that are executed before the policy looks again.
    execute: int = 8
    # What is taken from the policy to see whether it needs it.
    control: Control = "none"

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.execute < 1 or not self.tasks:
            raise QvlaError(f"a rollout needs tasks, episodes >= 1 and execute >= 1, got {self}")
        if self.control not in CONTROLS:
            raise QvlaError(f"control must be one of {CONTROLS}, got {self.control!r}")


@dataclass(frozen=True)
class EpisodeResult:
    """One episode."""

    task: str
    seed: int
    success: bool
    # Control steps until success or the limit.
    steps: int
    # ||A - A*||^2 of each decision, normalized units; empty without a reference policy.
    deviations: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """All episodes of one policy."""

    # What was evaluated, in words, and the digest of its checkpoint or bundle.
    policy: str
    digest: str
    config: RolloutConfig
    results: tuple[EpisodeResult, ...]
    versions: dict[str, str]

    def success(self, task: str | None = None) -> float:
        """Return the share of solved episodes, of one task or of all."""
        chosen = [r.success for r in self.results if task in (None, r.task)]
        return sum(chosen) / len(chosen)

    def interval(self) -> tuple[float, float]:
        """Return the Wilson 95 % interval of the overall success."""
        return wilson_interval(sum(r.success for r in self.results), len(self.results))

    def cumulative_deviation(self) -> list[float]:
        """Return the mean over episodes of the running sum of deviations, by decision (eq. 5)."""
        longest = max((len(r.deviations) for r in self.results), default=0)
        sums = np.zeros((len(self.results), longest))
        for row, result in zip(sums, self.results, strict=True):
            row[: len(result.deviations)] = result.deviations
        return [float(v) for v in np.cumsum(sums, axis=1).mean(axis=0)] if longest else []

    def save(self, path: Path) -> None:
        """Write JSON atomically, with the summary a reader looks for first."""
        low, high = self.interval()
        summary = {
            "success": self.success(),
            "wilson_95": [low, high],
            "episodes": len(self.results),
            "by_task": {task: self.success(task) for task in self.config.tasks},
            "cumulative_deviation": self.cumulative_deviation(),
        }
        write_json(path, {"summary": summary, **asdict(self)})


def load_evaluation(path: Path) -> Evaluation:
    """Read an evaluation.

    Raises:
        ArtifactError: the file is missing, damaged or of another version.
    """
    raw = read_json(path, "evaluation")
    require_fields(raw, ("policy", "digest", "config", "results", "versions"), str(path))
    config = RolloutConfig(**{**raw["config"], "tasks": tuple(raw["config"]["tasks"])})
    results = tuple(_result(row) for row in raw["results"])
    return Evaluation(raw["policy"], raw["digest"], config, results, raw["versions"])


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a success rate."""
    from scipy.stats import binomtest

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def evaluate(
    policy: str,
    digest: str,
    factory: PolicyFactory,
    config: RolloutConfig,
    output: Path,
    reference: PolicyFactory | None = None,
    workers: int = 2,
) -> Evaluation:
    """Run all episodes, sharded over processes, and write the evaluation to `output`.

    Finished episodes are kept in `<output>.partial`, so that an interrupted evaluation goes on
    where it stopped.  With `reference`, every decision is compared with that policy's.

    Raises:
        ArtifactMismatch: the partial file belongs to another policy or other settings.
    """
    config = _with_siblings(config) if config.control == "wrong-instruction" else config
    wanted = [(t, config.seed + i) for i in range(config.episodes) for t in config.tasks]
    partial = output.with_name(output.name + ".partial")
    done = _read_partial(partial, policy, digest, config)
    missing = [pair for pair in wanted if pair not in done]
    with Progress() as progress, partial.open("a") as journal:
        bar = progress.add_task(f"rollouts {policy}", total=len(wanted), completed=len(done))
        for result in _run_all(missing, factory, reference, config, workers):
            journal.write(json.dumps(asdict(result)) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
            done[result.task, result.seed] = result
            progress.advance(bar)
    ordered = tuple(done[pair] for pair in wanted)
    evaluation = Evaluation(policy, digest, config, ordered, versions())
    evaluation.save(output)
    partial.unlink()
    return evaluation


def run_episode(
    simulator: Simulator,
    policy: ActionPolicy,
    config: RolloutConfig,
    seed: int,
    reference: ActionPolicy | None = None,
) -> EpisodeResult:
    """Run one episode: look, act for `execute` control steps, look again."""
    instruction = None
    if config.control == "wrong-instruction":
        siblings = scene_siblings(simulator.task)
        instruction = siblings[seed % len(siblings)].instruction
    observation = simulator.reset(seed, instruction)
    deviations: list[float] = []
    while not simulator.done:
        seen = _blanked(observation) if config.control == "blank-image" else observation
        chunk = policy.infer(seen)
        if reference is not None:
            difference = chunk.normalized - reference.infer(seen).normalized
            deviations.append(float(np.square(difference, dtype=np.float64).sum()))
        for action in chunk.actions[: config.execute]:
            simulator.step(action)
            if simulator.done:
                break
        else:
            observation = simulator.observe()
    task = simulator.task.name
    return EpisodeResult(task, seed, simulator.success, simulator.steps, tuple(deviations))


def _blanked(observation: Observation) -> Observation:
    blank = np.full_like(observation.images[CAMERA], _BLANK)
    return replace(observation, images={CAMERA: blank})


def _with_siblings(config: RolloutConfig) -> RolloutConfig:
    tasks = tuple(name for name in config.tasks if scene_siblings(find_task(name)))
    if not tasks:
        raise QvlaError("the wrong-instruction control needs tasks that share a scene")
    return replace(config, tasks=tasks)


def _run_all(
    pairs: Sequence[tuple[str, int]],
    factory: PolicyFactory,
    reference: PolicyFactory | None,
    config: RolloutConfig,
    workers: int,
) -> Iterator[EpisodeResult]:
    # By task, so that a worker rarely builds another simulator.
    ordered = sorted(pairs)
    if workers <= 1:
        _start_worker(factory, reference, config)
        try:
            yield from map(_run_pair, ordered)
        finally:
            _close_worker()
        return
    # A forked child would inherit the parent's OpenGL and thread state.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (factory, reference, config))
    try:
        for job in as_completed([pool.submit(_run_pair, pair) for pair in ordered]):
            yield job.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker:
    """One process's policies and its simulator of the current task."""

    def __init__(
        self, factory: PolicyFactory, reference: PolicyFactory | None, config: RolloutConfig
    ) -> None:
        self.policy = factory()
        self.reference = reference() if reference is not None else None
        self.config = config
        self.simulator: Simulator | None = None

    def run(self, task: str, seed: int) -> EpisodeResult:
        if self.simulator is None or self.simulator.task.name != task:
            self.close()
            self.simulator = Simulator(find_task(task))
        return run_episode(self.simulator, self.policy, self.config, seed, self.reference)

    def close(self) -> None:
        if self.simulator is not None:
            self.simulator.close()
            self.simulator = None


_worker: _Worker | None = None


def _start_worker(
    factory: PolicyFactory, reference: PolicyFactory | None, config: RolloutConfig
) -> None:
    global _worker
    # The pool has a worker for each core: more threads in the renderer only contend.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    _worker = _Worker(factory, reference, config)
    # A renderer that outlives the interpreter's OpenGL prints errors.
    atexit.register(_close_worker)


def _close_worker() -> None:
    if _worker is not None:
        _worker.close()


def _run_pair(pair: tuple[str, int]) -> EpisodeResult:
    assert _worker is not None
    return _worker.run(*pair)


def _result(row: dict[str, Any]) -> EpisodeResult:
    return EpisodeResult(**{**row, "deviations": tuple(row["deviations"])})


def _read_partial(
    path: Path, policy: str, digest: str, config: RolloutConfig
) -> dict[tuple[str, int], EpisodeResult]:
    header = json.dumps({"policy": policy, "digest": digest, "config": asdict(config)})
    if not path.exists():
        write_bytes(path, f"{header}\n".encode())
        return {}
    lines = path.read_text().splitlines(keepends=True)
    if not lines or lines[0].strip() != header:
        raise ArtifactMismatch(
            f"{path} belongs to another policy or other settings; remove it to start anew"
        )
    results: dict[tuple[str, int], EpisodeResult] = {}
    whole = [line for line in lines[1:] if line.endswith("\n")]
    for line in whole:
        try:
            result = _result(json.loads(line))
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); remove it") from error
        results[result.task, result.seed] = result
    # A kill may leave half a line: cut it off before appending.
    write_bytes(path, "".join([lines[0], *whole]).encode())
    return results

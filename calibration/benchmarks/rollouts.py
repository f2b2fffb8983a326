"""Closed-loop rollouts: paired seeds, action deviation along episodes, controls, resumable."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from calibration.benchmarks.episode import run_episode
from calibration.benchmarks.evaluation import (
    CONTROLS,
    Control,
    EpisodeResult,
    Evaluation,
    RolloutConfig,
    load_evaluation,
    result_from_json,
)
from calibration.benchmarks.simulators import (
    BenchmarkSimulator,
    find_benchmark_task,
    open_simulator,
    simulator_versions,
)
from calibration.benchmarks.workers import leave_with_parent
from qvla_export.shared.action import ActionPolicy
from qvla_export.shared.artifacts import versions, write_bytes
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch, QvlaError

__all__ = [
    "CONTROLS",
    "Control",
    "EpisodeResult",
    "Evaluation",
    "PolicyFactory",
    "RolloutConfig",
    "RolloutJob",
    "evaluate",
    "load_evaluation",
    "run_episode",
]

# Makes a policy inside a worker process; must be picklable.
PolicyFactory = Callable[[], ActionPolicy]


@dataclass(frozen=True)
class RolloutJob:
    """Which policy runs which episodes, and beside which other one."""

    # What is evaluated, in words, and the digest of its checkpoint or bundle.
    policy: str
    digest: str
    # Makes it in each worker.
    factory: PolicyFactory
    config: RolloutConfig
    # Makes the policy that every decision is compared with; its digest keeps episodes beside two
    # references apart.
    reference: PolicyFactory | None = None
    reference_digest: str = ""


def evaluate(
    job: RolloutJob,
    output: Path,
    workers: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run all episodes, sharded over processes, and write the evaluation to `output`.

    Finished episodes wait in `<output>.partial`, so that an interrupted evaluation goes on where
    it stopped.

    Args:
        job: what runs, and which episodes.
        output: the JSON file to write.
        workers: processes; 1 runs in this one.
        on_progress: called with (episodes done, episodes in all).

    Raises:
        ArtifactMismatch: the partial file belongs to another policy or other settings.
        QvlaError: a policy's action cannot be executed, or a worker died.
    """
    config = job.config.runnable()
    wanted = [(t, config.seed + i) for i in range(config.episodes) for t in config.tasks]
    partial = output.with_name(output.name + ".partial")
    identity = {
        "policy": job.policy,
        "digest": job.digest,
        "reference": None if job.reference is None else job.reference_digest,
        "config": asdict(config),
    }
    done = _read_partial(partial, json.dumps(identity))
    missing = [pair for pair in wanted if pair not in done]
    tell = on_progress or _ignore
    tell(len(done), len(wanted))
    with partial.open("a") as journal:
        for result in _run_all(missing, job.factory, job.reference, config, workers):
            journal.write(json.dumps(asdict(result)) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
            done[result.task, result.seed] = result
            tell(len(done), len(wanted))
    ordered = tuple(done[pair] for pair in wanted)
    here = {**versions(), **simulator_versions(config.tasks)}
    evaluation = Evaluation(job.policy, job.digest, config, ordered, here)
    evaluation.save(output)
    partial.unlink()
    return evaluation


def _ignore(done: int, total: int) -> None:
    """Where nobody wants to know how far the episodes are."""


def _run_all(
    pairs: Sequence[tuple[str, int]],
    factory: PolicyFactory,
    reference: PolicyFactory | None,
    config: RolloutConfig,
    workers: int,
) -> Iterator[EpisodeResult]:
    if not pairs:
        return
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
    pool = ProcessPoolExecutor(workers, spawn, _start_process, (factory, reference, config))
    try:
        for job in as_completed([pool.submit(_run_pair, pair) for pair in ordered]):
            yield job.result()
    except BrokenProcessPool as error:
        raise QvlaError(
            "a worker process died, perhaps of too little memory; the same command continues, "
            "with fewer --workers if need be"
        ) from error
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
        self.simulator: BenchmarkSimulator | None = None

    def run(self, task: str, seed: int) -> EpisodeResult:
        if self.simulator is None or self.simulator.task.name != task:
            self.close()
            self.simulator = open_simulator(find_benchmark_task(task))
        return run_episode(self.simulator, self.policy, self.config, seed, self.reference)

    def close(self) -> None:
        if self.simulator is not None:
            self.simulator.close()
            self.simulator = None


_worker: _Worker | None = None
# Why this process has no worker: raised by its first episode, where the parent sees it.
_failure: QvlaError | None = None


def _start_process(
    factory: PolicyFactory, reference: PolicyFactory | None, config: RolloutConfig
) -> None:
    global _failure
    leave_with_parent()
    try:
        _start_worker(factory, reference, config)
    except QvlaError as error:
        _failure = error


def _start_worker(
    factory: PolicyFactory, reference: PolicyFactory | None, config: RolloutConfig
) -> None:
    global _worker
    # The pool has a worker for each core: more threads in the renderer only contend.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    _worker = _Worker(factory, reference, config)


def _close_worker() -> None:
    global _worker
    if _worker is not None:
        _worker.close()
        _worker = None


def _run_pair(pair: tuple[str, int]) -> EpisodeResult:
    if _failure is not None:
        raise _failure
    assert _worker is not None
    return _worker.run(*pair)


def _read_partial(path: Path, header: str) -> dict[tuple[str, int], EpisodeResult]:
    if not path.exists():
        write_bytes(path, f"{header}\n".encode())
        return {}
    lines = path.read_bytes().splitlines(keepends=True)
    if not lines or lines[0] != f"{header}\n".encode():
        raise ArtifactMismatch(
            f"{path} belongs to another policy or other settings; remove it to start anew"
        )
    results: dict[tuple[str, int], EpisodeResult] = {}
    whole = [line for line in lines[1:] if line.endswith(b"\n")]
    for line in whole:
        try:
            result = result_from_json(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); remove it to start anew") from error
        results[result.task, result.seed] = result
    # A kill may leave half a line: cut it off before appending.
    write_bytes(path, b"".join([lines[0], *whole]))
    return results

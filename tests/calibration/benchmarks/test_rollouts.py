"""Closed-loop rollouts: paired scenes, controls, deviations, and the same result after any kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from places import HELPERS, ROOT
from scipy.stats import binomtest
from scripted_policies import (
    ConstantPolicy,
    ExpertPolicy,
    FailingPolicy,
    HashPolicy,
    die,
    refuse_to_open,
)

from calibration.benchmarks.evaluation import (
    EpisodeResult,
    Evaluation,
    RolloutConfig,
    load_evaluation,
    wilson_interval,
)
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import CAMERA, find_task, scene_siblings
from calibration.benchmarks.rollouts import PolicyFactory, RolloutJob, evaluate, run_episode
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch, QvlaError
from qvla_export.shared.observation import Observation

CONFIG = RolloutConfig(("handle-press", "drawer-open"), episodes=2, execute=8)
EVALUATE = """
import sys
from functools import partial
from pathlib import Path
from calibration.benchmarks.evaluation import RolloutConfig
from calibration.benchmarks.rollouts import RolloutJob, evaluate
from scripted_policies import HashPolicy
if __name__ == "__main__":
    config = RolloutConfig(("handle-press", "drawer-open"), episodes=2, execute=8)
    shifted = partial(HashPolicy, offset=0.5)
    job = RolloutJob("hash", "d", HashPolicy, config, shifted, "shifted")
    evaluate(job, Path(sys.argv[1]), 2)
"""


@pytest.fixture(scope="module")
def drawer() -> Iterator[Simulator]:
    with Simulator(find_task("drawer-close")) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluation of `HashPolicy` beside a shifted one, in this process."""
    path = tmp_path_factory.mktemp("rollouts") / "evaluation.json"
    run(path)
    return path


def run(
    path: Path,
    factory: PolicyFactory = HashPolicy,
    digest: str = "d",
    config: RolloutConfig = CONFIG,
    reference_digest: str = "shifted",
    workers: int = 1,
) -> Evaluation:
    shifted = partial(HashPolicy, offset=0.5)
    job = RolloutJob("hash", digest, factory, config, shifted, reference_digest)
    return evaluate(job, path, workers)


def test_a_seed_is_one_scene_to_all_policies(drawer: Simulator) -> None:
    config = RolloutConfig(("drawer-close",), 1)
    first, second = ConstantPolicy(), ConstantPolicy(np.ones((8, 4), np.float32))
    run_episode(drawer, first, config, 7)
    placement = drawer.placement.tolist()
    run_episode(drawer, second, config, 7)
    assert drawer.placement.tolist() == placement
    assert first.seen[0].images[CAMERA].tobytes() == second.seen[0].images[CAMERA].tobytes()
    assert first.seen[0].state.tolist() == second.seen[0].state.tolist()
    run_episode(drawer, second, config, 8)
    assert drawer.placement.tolist() != placement


def test_a_look_is_told_what_the_one_before_chose(drawer: Simulator) -> None:
    """Also the reference, which sees what the policy sees; an episode's first look follows none."""

    class Counting(ConstantPolicy):
        def infer(self, observation: Observation) -> ActionChunk:
            chunk = super().infer(observation)
            return replace(chunk, history=(len(self.seen),))

    policy, reference = Counting(), Counting()
    for _ in range(2):
        run_episode(drawer, policy, RolloutConfig(("drawer-close",), 1), 0, reference)
    looks = len(policy.seen) // 2
    assert looks > 1
    expected = [(), *((look,) for look in range(1, looks))]
    expected += [(), *((look,) for look in range(looks + 1, 2 * looks))]
    for seen in (policy.seen, reference.seen):
        assert [observation.history for observation in seen] == expected


def test_an_expert_succeeds_and_waiting_does_not(drawer: Simulator) -> None:
    config = RolloutConfig(("drawer-close",), 1)
    expert, lazy = ExpertPolicy(drawer), ConstantPolicy()
    for seed in range(3):
        solved = run_episode(drawer, expert, config, seed)
        assert (solved.task, solved.seed, solved.success) == ("drawer-close", seed, True)
        assert 0 < solved.steps < drawer.task.steps
        assert solved.deviations == ()
    failed = run_episode(drawer, lazy, config, 0)
    assert (failed.success, failed.steps) == (False, drawer.task.steps)


@pytest.mark.parametrize(("horizon", "execute", "looks"), [(8, 8, 15), (8, 5, 24), (3, 8, 40)])
def test_a_chunk_is_executed_as_far_as_asked_or_as_it_goes(
    drawer: Simulator, horizon: int, execute: int, looks: int
) -> None:
    policy = ConstantPolicy(np.zeros((horizon, 4), np.float32))
    result = run_episode(drawer, policy, RolloutConfig(("drawer-close",), 1, 0, execute), 0)
    assert result.steps == 120
    assert len(policy.seen) == looks


def test_the_interval_is_wilsons() -> None:
    for successes, episodes in [(0, 20), (20, 20), (13, 20), (1, 1), (77, 160)]:
        expected = binomtest(successes, episodes).proportion_ci(0.95, "wilson")
        assert wilson_interval(successes, episodes) == (expected.low, expected.high)
    evaluation = evaluation_of([(True, ()), (False, ()), (True, ())])
    assert evaluation.interval() == wilson_interval(2, 3)
    assert evaluation.success() == evaluation.success("handle-press") == pytest.approx(2 / 3)
    with pytest.raises(QvlaError, match="no episode of drawer-open was run"):
        evaluation.success("drawer-open")


def evaluation_of(results: list[tuple[bool, tuple[float, ...]]]) -> Evaluation:
    rows = tuple(EpisodeResult("handle-press", i, s, 9, d) for i, (s, d) in enumerate(results))
    return Evaluation("p", "d", RolloutConfig(("handle-press",), len(rows)), rows, {})


def test_deviation_adds_up_and_an_ended_episode_keeps_its_sum() -> None:
    evaluation = evaluation_of([(True, (1.0, 2.0)), (False, (3.0, 4.0, 5.0))])
    assert evaluation.cumulative_deviation() == [2.0, 5.0, 7.5]
    assert evaluation_of([(True, ())]).cumulative_deviation() == []


def test_a_policy_does_not_deviate_from_itself(drawer: Simulator) -> None:
    result = run_episode(drawer, HashPolicy(), RolloutConfig(("drawer-close",), 1), 0, HashPolicy())
    assert result.deviations
    assert set(result.deviations) == {0.0}


def test_a_constant_offset_deviates_linearly(uninterrupted: Path) -> None:
    loaded = load_evaluation(uninterrupted)
    for result in loaded.results:
        cumulative = replace(loaded, results=(result,)).cumulative_deviation()
        # Eight actions of four numbers, each half a unit off; float32 rounds the actions.
        assert cumulative == pytest.approx([8.0 * (i + 1) for i in range(len(cumulative))])


def test_blank_images_are_blank_and_nothing_else_is(drawer: Simulator) -> None:
    policy, seeing = ConstantPolicy(), ConstantPolicy()
    config = RolloutConfig(("drawer-close",), 1)
    run_episode(drawer, policy, replace(config, control="blank-image"), 3)
    run_episode(drawer, seeing, config, 3)
    for blank, seen in zip(policy.seen, seeing.seen, strict=True):
        assert np.ptp(blank.images[CAMERA]) == 0
        assert np.ptp(seen.images[CAMERA]) > 100
        assert blank.images[CAMERA].shape == seen.images[CAMERA].shape
        assert blank.state.tolist() == seen.state.tolist()
        assert blank.instruction == seen.instruction == drawer.task.instruction


def test_the_wrong_instruction_is_a_siblings(drawer: Simulator) -> None:
    policy = ConstantPolicy()
    config = RolloutConfig(("drawer-close",), 1, control="wrong-instruction")
    run_episode(drawer, policy, config, 3)
    said = {o.instruction for o in policy.seen}
    assert said == {scene_siblings(drawer.task)[0].instruction} == {"open the drawer"}


def test_only_tasks_with_siblings_can_be_told_something_wrong(tmp_path: Path) -> None:
    config = RolloutConfig(("handle-press", "drawer-close"), 1, control="wrong-instruction")
    assert config.runnable().tasks == ("drawer-close",)
    done = evaluate(RolloutJob("p", "d", ConstantPolicy, config), tmp_path / "e.json", workers=1)
    assert {r.task for r in done.results} == {"drawer-close"}
    alone = replace(config, tasks=("handle-press",))
    with pytest.raises(QvlaError, match=r"tasks that share a scene with another, got handle-press"):
        evaluate(RolloutJob("p", "d", ConstantPolicy, alone), tmp_path / "f.json", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "needs tasks"),
        ({"episodes": 0}, "episodes >= 1"),
        ({"execute": 0}, "execute >= 1"),
        ({"seed": -1}, "seed >= 0"),
        ({"control": "deaf"}, "control must be one of"),
        ({"tasks": ("handle-press", "handle-press")}, "each task counts once"),
        ({"tasks": ("make-tea",)}, "no task is called 'make-tea'"),
    ],
)
def test_impossible_rollouts_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(QvlaError, match=message):
        replace(CONFIG, **change)


def test_an_evaluation_is_saved_with_its_summary(uninterrupted: Path) -> None:
    loaded = load_evaluation(uninterrupted)
    assert (loaded.policy, loaded.digest, loaded.config) == ("hash", "d", CONFIG)
    pairs = [(r.task, r.seed) for r in loaded.results]
    assert pairs == [(t, CONFIG.seed + i) for i in range(2) for t in CONFIG.tasks]
    summary = json.loads(uninterrupted.read_text())["summary"]
    assert summary["episodes"] == 4
    assert summary["success"] == loaded.success()
    assert summary["wilson_95"] == list(loaded.interval())
    assert set(summary["by_task"]) == set(CONFIG.tasks)
    assert summary["cumulative_deviation"] == loaded.cumulative_deviation()
    assert not uninterrupted.with_name("evaluation.json.partial").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"policy": 1}'])
def test_what_is_no_evaluation_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"evaluation\.json"):
        load_evaluation(path)


def test_an_evaluation_of_another_version_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    whole = json.loads(uninterrupted.read_text())
    for change in (
        {"config": {**whole["config"], "weather": "rain"}},
        {"config": {**whole["config"], "episodes": 0}},
        {"results": [{"task": "handle-press"}]},
        {"results": None},
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(ArtifactError, match="run qvla evaluate anew"):
            load_evaluation(path)


def test_an_interrupted_evaluation_goes_on_to_the_same_result(
    uninterrupted: Path, tmp_path: Path
) -> None:
    path = tmp_path / "evaluation.json"
    with pytest.raises(KeyboardInterrupt):
        run(path, partial(FailingPolicy, KeyboardInterrupt, 20))
    assert not path.exists()
    assert (tmp_path / "evaluation.json.partial").read_bytes().count(b"\n") == 1 + 1
    # Only the three missing episodes are run, of 15 decisions each.
    run(path, partial(FailingPolicy, RuntimeError, 3 * 15))
    assert path.read_bytes() == uninterrupted.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_two_workers_killed_go_on_to_the_result_of_one(uninterrupted: Path, tmp_path: Path) -> None:
    script, path = tmp_path / "evaluate.py", tmp_path / "evaluation.json"
    script.write_text(EVALUATE)
    command = [sys.executable, "-W", "ignore", str(script), str(path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}"}
    running = subprocess.Popen(command, env=environment)
    journal = tmp_path / "evaluation.json.partial"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert running.poll() is None
        time.sleep(0.01)
    children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGKILL)
    running.wait()
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert gone and not alive, "workers must not outlive the evaluation"
    assert not path.exists()
    subprocess.run(command, env=environment, check=True)
    assert path.read_bytes() == uninterrupted.read_bytes()
    assert not journal.exists()


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Journal of an evaluation that failed after one episode."""
    path = tmp_path_factory.mktemp("stopped") / "evaluation.json"
    with pytest.raises(RuntimeError):
        run(path, partial(FailingPolicy, RuntimeError, 20))
    assert not path.exists()
    return path.with_name("evaluation.json.partial").read_bytes()


@pytest.fixture
def stopped(journal: bytes, tmp_path: Path) -> Path:
    """Where that evaluation would go on."""
    (tmp_path / "evaluation.json.partial").write_bytes(journal)
    return tmp_path / "evaluation.json"


def test_half_a_line_of_the_journal_is_run_again(uninterrupted: Path, stopped: Path) -> None:
    journal = stopped.with_name("evaluation.json.partial")
    journal.write_bytes(journal.read_bytes()[:-20])
    run(stopped)
    assert stopped.read_bytes() == uninterrupted.read_bytes()


def test_a_journal_of_something_else_is_not_mixed_in(stopped: Path) -> None:
    journal = stopped.with_name("evaluation.json.partial")
    before = journal.read_bytes()
    changes: tuple[dict[str, Any], ...] = (
        {"digest": "e"},
        {"config": replace(CONFIG, seed=5)},
        {"config": replace(CONFIG, control="blank-image")},
        {"reference_digest": "another"},
    )
    for change in changes:
        with pytest.raises(ArtifactMismatch, match=r"another policy or other settings; remove it"):
            run(stopped, **change)
    assert journal.read_bytes() == before
    assert not stopped.exists()


@pytest.mark.parametrize("row", ["{", "[]", '{"task": 1}', "\xff"])
def test_a_damaged_journal_is_named(stopped: Path, row: str) -> None:
    journal = stopped.with_name("evaluation.json.partial")
    journal.write_bytes(journal.read_bytes() + row.encode("latin-1") + b"\n")
    with pytest.raises(ArtifactError, match=r"partial is damaged .* remove it"):
        run(stopped)


def test_actions_that_cannot_be_executed_stop_the_episode(drawer: Simulator) -> None:
    config = RolloutConfig(("drawer-close",), 1)
    bad = np.zeros((8, 4), np.float32)
    bad[5, 2] = np.nan
    good = np.zeros((8, 4), np.float32)
    for policy in (ConstantPolicy(bad), ConstantPolicy(good, bad), ConstantPolicy(good + np.inf)):
        with pytest.raises(QvlaError, match="NaN or infinity"):
            run_episode(drawer, policy, config, 0)
    with pytest.raises(QvlaError, match="at least one action, got an empty chunk"):
        run_episode(drawer, ConstantPolicy(good[:0]), config, 0)
    with pytest.raises(QvlaError, match=r"chunks of one shape, got \[8, 4\] and \[3, 4\]"):
        run_episode(drawer, ConstantPolicy(good), config, 0, ConstantPolicy(good[:3]))


def test_what_fails_in_a_worker_is_told(tmp_path: Path) -> None:
    config = RolloutConfig(("handle-press",), 2)
    path = tmp_path / "evaluation.json"
    with pytest.raises(QvlaError, match="this policy cannot be opened"):
        evaluate(RolloutJob("p", "d", HashPolicy, config, refuse_to_open), path, workers=2)
    with pytest.raises(QvlaError, match="worker process died"):
        evaluate(RolloutJob("p", "d", HashPolicy, config, die), path, workers=2)
    assert not path.exists()

"""Phases of a task, and the error in each."""

from dataclasses import replace

import numpy as np
import pytest
from scripted_policies import ExpertPolicy, HashPolicy

from calibration.benchmarks.episode import run_episode
from calibration.benchmarks.evaluation import (
    EpisodeResult,
    Evaluation,
    RolloutConfig,
    load_evaluation,
)
from calibration.benchmarks.evaluation_lines import evaluation_lines
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import find_task
from calibration.benchmarks.phases import PHASES, phase_of


@pytest.mark.parametrize(
    ("opened", "closed", "opened_again", "distance_m", "phase"),
    [
        (0, 0, 0, 0.5, "approach"),
        (9, 0, 0, 0.01, "approach"),
        (9, 1, 0, 0.5, "grasp"),
        (0, 12, 0, 0.01, "grasp"),
        (9, 13, 0, 0.5, "carry"),
        (9, 13, 0, 0.05, "insert"),
        (0, 13, 0, float("inf"), "carry"),
        (9, 13, 1, 0.05, "place"),
    ],
)
def test_phases(opened: int, closed: int, opened_again: int, distance_m: float, phase) -> None:
    closing = np.repeat([False, True, False], [opened, closed, opened_again])
    assert phase_of(closing, distance_m) == phase


def test_an_expert_goes_through_a_task_in_order(tmp_path) -> None:
    with Simulator(find_task("pick-place")) as simulator:
        config = RolloutConfig(("pick-place",), 1)
        expert = ExpertPolicy(simulator)
        result = run_episode(simulator, expert, config, 1, expert)
        other = run_episode(
            simulator, HashPolicy(), replace(config, execute=4), 1, HashPolicy(offset=0.5)
        )
    assert result.success and len(result.phases) == len(result.deviations)
    seen = list(dict.fromkeys(result.phases))
    assert seen == [phase for phase in PHASES if phase in seen]
    assert {"approach", "grasp", "insert"} <= set(seen)
    evaluation = Evaluation("p", "d", config, (result, other), {})
    by_phase = evaluation.error_by_phase()
    decided = [*result.deviations, *other.deviations]
    counts = [[*result.phases, *other.phases].count(phase) for phase in by_phase]
    assert np.dot(list(by_phase.values()), counts) / sum(counts) == pytest.approx(np.mean(decided))
    evaluation.save(tmp_path / "evaluation.json")
    assert load_evaluation(tmp_path / "evaluation.json").error_by_phase() == by_phase
    lines = list(evaluation_lines(evaluation, tmp_path))
    assert any("on policy" in line and "approach" in line for line in lines)


def test_evaluations_of_before_have_no_phases() -> None:
    row = EpisodeResult("push", 0, True, 9, (0.5, 0.25))
    assert Evaluation("p", "d", RolloutConfig(("push",), 1), (row,), {}).error_by_phase() == {}

"""Motion figures against numbers worked by hand; two evaluations of the same episodes, paired."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scripted_policies import ConstantPolicy
from typer.testing import CliRunner

from calibration.benchmarks.evaluation import (
    EpisodeResult,
    Evaluation,
    RolloutConfig,
    load_evaluation,
)
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import find_task
from calibration.benchmarks.motion import Motion, measure_motion, summarize_motion
from calibration.benchmarks.rollouts import run_episode
from qvla_export.comparison.paired import mean_difference, paired_difference
from qvla_export.pipeline.paired_evaluations import pair_evaluations
from qvla_export.shared.errors import ArtifactMismatch, QvlaError


def still(count: int) -> np.ndarray:
    return np.zeros((count, 4), np.float32)


def test_jerk_is_the_third_difference_of_the_path() -> None:
    # x = t^3 has a third difference of 6 a step; one of 0.001 m at 10 Hz is 6 m/s^3.
    cubic = np.zeros((9, 3))
    cubic[:, 0] = 0.001 * np.arange(9) ** 3
    motion = measure_motion(cubic, still(8), (), 10.0, 20.0)
    assert motion.jerk_rms == pytest.approx(6.0)
    assert motion.jerk_p99 == pytest.approx(6.0)
    # Positions 0 0 0 0 1 mm 0 0 0: third differences 1, -3, 3, -1 (and one of 0) in all directions.
    bump = np.zeros((8, 3))
    bump[4] = 0.001
    motion = measure_motion(bump, still(7), (), 10.0, 20.0)
    # Lengths are root 3 times those: squares 3, 27, 27, 3, 0 over 5 steps.
    assert motion.jerk_rms == pytest.approx(np.sqrt(60 / 5))
    assert motion.jerk_p99 == pytest.approx(3 * np.sqrt(3))
    # A steady hand, however fast, has none; nor has a path too short for one.
    line = np.outer(np.arange(6), [0.01, 0.02, 0.0])
    assert measure_motion(line, still(5), (), 40.0, 20.0).jerk_rms == pytest.approx(0, abs=1e-9)
    assert measure_motion(line[:3], still(2), (), 40.0, 20.0).jerk_p99 == 0.0


def test_flips_and_seams_are_of_what_was_commanded() -> None:
    actions = still(6)
    actions[:, 3] = (-1.0, 0.0, 0.6, 0.31, 0.29, 1.0)
    actions[:, 0] = (0.0, 0.5, 0.5, -0.5, -0.5, 0.0)
    actions[:, 1] = (0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
    motion = measure_motion(np.zeros((7, 3)), actions, (3, 5), 40.0, 20.0)
    assert motion.gripper_flips == 3
    # From 0.5 to -0.5 along x, then from -0.5 to 0: 20 and 10 mm.
    assert motion.seam_jumps_mm == pytest.approx((20.0, 10.0))


def test_a_summary_pools_seams_and_averages_episodes() -> None:
    episodes = [Motion(1.0, 2.0, 0, (3.0,)), Motion(3.0, 6.0, 3, (4.0, 0.0))]
    summary = summarize_motion(episodes, [10, 20])
    assert (summary.steps_to_success, summary.jerk_rms, summary.jerk_p99) == (15.0, 2.0, 4.0)
    assert summary.gripper_flips == 1.5
    assert summary.seam_rms_mm == pytest.approx(np.sqrt(25 / 3))
    assert summary.seam_p99_mm == pytest.approx(3.98)
    assert summarize_motion(episodes, []).steps_to_success is None


def test_an_episode_records_the_motion_of_what_was_executed() -> None:
    chunk = np.zeros((8, 4), np.float32)
    chunk[:4] = (7.0, 0.0, 0.0, 1.0)  # clipped to 1 as the robot clips it
    chunk[4:] = (-1.0, 0.0, 0.0, -1.0)
    task = replace(find_task("push"), steps=20)
    with Simulator(task) as simulator:
        result = run_episode(simulator, ConstantPolicy(chunk), RolloutConfig(("push",), 1), 0)
    motion = result.motion
    assert motion is not None
    # Chunks of 8, 8 and 4 steps; each seam turns the hand round, 2 x 20 mm.
    assert motion.seam_jumps_mm == pytest.approx((40.0, 40.0))
    assert motion.gripper_flips == 4
    assert 1.0 < motion.jerk_rms < motion.jerk_p99


def evaluation_of(solved: list[bool], **change: int) -> Evaluation:
    config = RolloutConfig(("pick-place", "push"), len(solved) // 2, **change)
    pairs = [(task, config.seed + i) for i in range(config.episodes) for task in config.tasks]
    motion = Motion(1.0, 2.0, 1, (3.0, 4.0))
    results = tuple(
        EpisodeResult(task, seed, yes, 30, (), motion)
        for (task, seed), yes in zip(pairs, solved, strict=True)
    )
    return Evaluation("a", "b", config, results, {})


def test_motion_survives_the_file_and_older_files_have_none(tmp_path: Path) -> None:
    evaluation = evaluation_of([True, False])
    evaluation.save(tmp_path / "new.json")
    assert load_evaluation(tmp_path / "new.json") == evaluation
    assert evaluation.motion() == summarize_motion([Motion(1.0, 2.0, 1, (3.0, 4.0))] * 2, [30])
    older = replace(evaluation.results[0], motion=None)
    mixed = replace(evaluation, results=(older, evaluation.results[1]))
    mixed.save(tmp_path / "old.json")
    assert load_evaluation(tmp_path / "old.json").motion() is None


def test_episodes_of_one_scene_are_one_cluster() -> None:
    ours, theirs = [True, True] * 10, [True, True] * 8 + [False, False] * 2
    pair = pair_evaluations(evaluation_of(ours), evaluation_of(theirs))
    assert (pair.success.episodes, pair.scenes) == (20, 10)
    assert pair.success.value == pytest.approx(0.2)
    # Both episodes of a scene always agree: they are worth one, and the variance is twice as large.
    assert pair.success.design_effect == pytest.approx(2.0)
    single = paired_difference(ours, theirs)
    assert single.design_effect == 1.0
    reach = pair.success.value - pair.success.low
    assert reach == pytest.approx(np.sqrt(2) * (single.value - single.low))
    # Without a difference there is nothing to widen, and clusters never narrow.
    assert paired_difference(ours, ours, range(20)).design_effect == 1.0
    opposed = paired_difference([True, False], [False, True], ["one", "one"])
    assert opposed.design_effect == 1.0


def test_evaluations_of_other_episodes_are_not_paired() -> None:
    with pytest.raises(ArtifactMismatch, match="must be of the same episodes"):
        pair_evaluations(evaluation_of([True, True]), evaluation_of([True, True], seed=7))


def test_the_episodes_that_both_have_are_paired() -> None:
    few = evaluation_of([True, True, False, False])
    many = evaluation_of([True, False, True, False, True, True])
    here, there = pair_evaluations(few, many), pair_evaluations(many, few)
    assert here.success.episodes == there.success.episodes == 4
    assert here.success.value == there.success.value == 0.0
    assert (here.success.gained, here.success.lost) == (1, 1)
    assert here.scenes == there.scenes == 2


def test_motion_is_paired_with_scenes_as_clusters() -> None:
    # Sums off the mean of 1 are 2 and -2: a variance of 2 x (4 + 4) over 4 episodes squared.
    apart = mean_difference([2.0, 2.0, 0.0, 0.0], ["a", "a", "b", "b"])
    assert apart.value == 1.0
    assert apart.high - 1.0 == pytest.approx(1.959964 * np.sqrt(16) / 4) == 1.0 - apart.low
    # What cancels within a scene is no doubt about the mean.
    assert mean_difference([2.0, 0.0, 2.0, 0.0], ["a", "a", "b", "b"]).low == 1.0
    with pytest.raises(QvlaError, match="at least two scenes, got 1"):
        mean_difference([1.0, 2.0], ["a", "a"])
    ours, theirs = evaluation_of([True] * 6), evaluation_of([True] * 6)
    flipped = tuple(
        replace(row, motion=Motion(1.5, 2.0, 2 if row.seed == ours.config.seed else 1, ()))
        for row in ours.results
    )
    pair = pair_evaluations(replace(ours, results=flipped), theirs)
    assert pair.flips is not None and pair.flips.value == pytest.approx(1 / 3)
    assert pair.flips.low < 0 < pair.flips.high
    assert pair.jerk_rms is not None and pair.jerk_rms.low == pytest.approx(0.5)
    # Without motion, or of a single scene, there is no interval of it.
    still_ones = tuple(replace(row, motion=None) for row in ours.results)
    assert pair_evaluations(replace(ours, results=still_ones), theirs).flips is None
    assert pair_evaluations(evaluation_of([True] * 2), theirs).flips is None


def test_a_delay_is_paired_with_none_and_said() -> None:
    late = evaluation_of([True, False] * 2, delay_steps=4, roll_forward=True)
    prompt = evaluation_of([True, True] * 2)
    pair = pair_evaluations(late, prompt)
    assert pair.success.value == -0.5
    assert "; there a delay of 0 steps; " in str(pair)
    assert "there a delay of 4 steps, roll-forward" in str(pair_evaluations(prompt, late))
    assert pair_evaluations(prompt, prompt).other_timing is None


def test_evaluate_says_what_changed_against_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qvla_export.cli.app import app
    from qvla_export.pipeline import evaluate as step

    ours, theirs = evaluation_of([True, False] * 5), evaluation_of([True, True] * 5)
    theirs.save(tmp_path / "float.json")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(step, "evaluate_policy", lambda *_: ours)
    arguments = ["evaluate", str(tmp_path), "--output", str(tmp_path / "ours.json")]
    arguments += ["--against", str(tmp_path / "float.json")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "-50.0 points" in shown.output and "of 10 paired episodes in 5 scenes" in shown.output
    assert "30.0 steps to success, jerk RMS 1.0 and 99 % 2.0 m/s^3" in shown.output

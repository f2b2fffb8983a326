"""Stages and the report refuse what does not belong together."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.calibration_set import CalibrationSet
from engines.targets import CPU
from qvla_export.allocation.setting import parse_setting
from qvla_export.pipeline import evaluate as judging
from qvla_export.pipeline import export as exporting
from qvla_export.pipeline.plan import plan as plan_setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, agreement, sensitivities
from qvla_export.policies.oft.config import load_config
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.shared.errors import ArtifactMismatch
from qvla_export.shared.observation import Observation

TWO_PROBES = SensitivityRequest(quantizer="nearest", probes=2)
FLOAT, W4 = parse_setting("float"), parse_setting("w4")


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
) -> RunFolder:
    """Everything up to the bundles of two settings."""
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    drawn = tuple(tiny_observations(12))
    CalibrationSet(drawn[:8], drawn[8:], {"test": 1}).save(folder.calibration)
    sensitivities(folder, tiny_policy, CPU, TWO_PROBES)
    for setting in (FLOAT, W4):
        plan_setting(folder, setting, CPU, tiny_policy.digest)
        exporting.export(folder, setting, tiny_policy, CPU)
    return folder


@pytest.fixture
def run(whole: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of it, for one test to change."""
    return RunFolder(shutil.copytree(whole.root, tmp_path / "run"))


def _swap(run: RunFolder) -> None:
    """Judge by what was measured on, and the other way round."""
    drawn = CalibrationSet.load(run.calibration)
    CalibrationSet(drawn.held_out, drawn.observations, {"test": 2}).save(run.calibration)


def test_a_plan_is_not_judged_on_what_it_was_fitted_to(
    run: RunFolder, tiny_policy: OftPolicy
) -> None:
    _swap(run)
    for stage in (exporting.export, judging_error):
        with pytest.raises(ArtifactMismatch, match="plan and calibration set"):
            stage(run, W4, tiny_policy, CPU)
    with pytest.raises(ArtifactMismatch, match="sensitivities and calibration set"):
        agreement(run, tiny_policy, 5, 0)


def judging_error(run: RunFolder, setting: object, policy: OftPolicy, target: object) -> object:
    return judging.action_error(run, W4, policy)


def test_a_float_bundle_takes_the_golden_observations_of_the_set(
    run: RunFolder, tiny_policy: OftPolicy
) -> None:
    before = exporting.export(run, FLOAT, tiny_policy, CPU)
    assert exporting.export(run, FLOAT, tiny_policy, CPU).digest == before.digest
    _swap(run)
    assert exporting.export(run, FLOAT, tiny_policy, CPU).digest != before.digest


def test_another_configuration_is_another_policy(
    run: RunFolder, tiny_policy: OftPolicy, tiny_checkpoint: Path
) -> None:
    config = replace(load_config(tiny_checkpoint), training_image_size=28, center_crop=True)
    other = load_oft_policy(tiny_checkpoint, None, config)
    with pytest.raises(ArtifactMismatch):
        exporting.export(run, W4, other, CPU)
    with pytest.raises(ArtifactMismatch):
        judging.action_error(run, FLOAT, other)
    exported = exporting.export(run, FLOAT, other, CPU)
    assert exported.policy_digest == other.digest != tiny_policy.digest
    assert exported.processor.spec.center_crop


def test_other_seeds_and_probes_are_measured_anew(run: RunFolder, tiny_policy: OftPolicy) -> None:
    first = sensitivities(run, tiny_policy, CPU, TWO_PROBES)
    again = sensitivities(run, tiny_policy, CPU, TWO_PROBES)
    assert again.digest == first.digest
    assert sensitivities(run, tiny_policy, CPU, replace(TWO_PROBES, seed=1)).digest != first.digest
    compared = agreement(run, tiny_policy, 5, 0)
    assert len(compared.pairs) == 5
    assert len(agreement(run, tiny_policy, 7, 0).pairs) == 7


def test_latency_on_other_threads_is_measured_anew(run: RunFolder) -> None:
    one = judging.latency(run, (FLOAT, W4), 3, 1)
    assert [p.conditions for p in one.profiles][:2] == ["1 threads, packed"] * 2
    kept = judging.latency(run, (FLOAT, W4), 3, 1)
    assert kept.profiles[0].first_action_ms == one.profiles[0].first_action_ms
    assert judging.latency(run, (FLOAT, W4), 3, 2).profiles[0].conditions == "2 threads, packed"

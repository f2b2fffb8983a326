"""Cross-validation as a call: what it refuses, and plans whose codes are the nearest ones."""

from pathlib import Path

import pytest
from tiny_policy import tiny_observations

from calibration.calibration_set import CalibrationSet
from engines.targets import CPU
from qvla_export.allocation.setting import parse_setting
from qvla_export.pipeline.deployment.cross_validation import predict_error
from qvla_export.pipeline.fake_quantized import judge_plan
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.errors import QvlaError

SETTING = parse_setting("w8-rtn")


def run_of(policy: OftPolicy, root: Path, observations: int) -> RunFolder:
    """Write a run with a uniform plan of nearest codes and few observations."""
    run = RunFolder(root)
    CalibrationSet(tiny_observations(observations), (), {"test": 1}).save(run.calibration)
    plan = uniform_plan(layer_shapes(policy.layers()), 8, CPU, policy.digest)
    plan.save(run.plan(SETTING))
    return run


def test_nearest_codes_are_judged_as_they_are(tiny_policy: OftPolicy, tmp_path: Path) -> None:
    run = run_of(tiny_policy, tmp_path, 6)
    found = predict_error(run, SETTING, tiny_policy)
    plan = uniform_plan(layer_shapes(tiny_policy.layers()), 8, CPU, tiny_policy.digest)
    measured = judge_plan(tiny_policy, plan, tiny_observations(6))
    # The same observations and weights; four probes of six observations spread by about a fifth.
    assert found.rms == pytest.approx(measured.rms, rel=0.5)
    assert found.plan_digest == plan.digest
    assert run.predicted_error(SETTING).is_file()


def test_what_cannot_be_predicted_is_refused(tiny_policy: OftPolicy, tmp_path: Path) -> None:
    run = run_of(tiny_policy, tmp_path, 3)
    with pytest.raises(QvlaError, match=r"needs 4 calibration observations, got 3.*--count"):
        predict_error(run, SETTING, tiny_policy)
    with pytest.raises(QvlaError, match="float rounds nothing"):
        predict_error(run, parse_setting("float"), tiny_policy)
    assert not run.predicted_error(SETTING).exists()

"""The step that judges other libraries' quantization, and the command that runs it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from baseline_layers import baseline_of, to_nearest
from typer.testing import CliRunner

from calibration.calibration_set import CalibrationSet
from engines.targets import CPU
from qvla_export.baselines.applied import baseline_applied
from qvla_export.baselines.methods import METHODS, BaselineRequest
from qvla_export.baselines.results import baseline_paths, baseline_results
from qvla_export.cli.app import app
from qvla_export.pipeline.baseline import request_for
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]


def test_scales_are_stored_as_the_target_stores_its_own() -> None:
    found = {bits: request_for(CPU, "gptq", bits, None, 0, 200) for bits in (2, 3, 4, 8)}
    assert {b: (r.group_size, r.scale_bits) for b, r in found.items()} == {
        2: (64, 16),
        3: (64, 16),
        4: (64, 16),
        8: (None, 32),
    }
    assert [r.setting for r in found.values()] == ["w2-gptq", "w3-gptq", "w4-gptq", "w8-gptq"]
    assert BaselineRequest("smoothquant", 8, 8).setting == "w8a8-smoothquant"
    libraries = {m.library for m in METHODS.values() if m.installed_apart}
    assert libraries == {"modelopt", "llmcompressor", "auto_round"}
    assert request_for(CPU, "sign", 1, None, 0, 200).group_size == 64


@pytest.fixture
def run(tiny_observations: Make, tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    CalibrationSet(tuple(tiny_observations(4)), tuple(tiny_observations(3, 1)), {"count": 4}).save(
        folder.calibration
    )
    return folder


def test_the_command_judges_a_baseline_that_is_there(
    run: RunFolder, tiny_policy: OftPolicy, tiny_checkpoint: Path
) -> None:
    """No library is needed for what is made already, and nothing is measured twice."""
    digest = CalibrationSet.load(run.calibration).digest
    paths = baseline_paths(run.root, "w4-max")
    rounded = baseline_of(tiny_policy, to_nearest)
    made = replace(rounded, calibration_digest=digest, libraries={"nvidia-modelopt": "0.47.0"})
    made.save(paths.baseline)
    command = ["baseline", "max", "--run", str(run.root), "--policy", str(tiny_checkpoint)]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    assert "w4-max: held-out action error" in " ".join(outcome.output.split())
    (result,) = baseline_results(run.root)
    assert result.action_error is not None and result.action_error["rms"] > 0
    assert result.action_error["held_out"] == 3
    assert (result.setting, result.library) == ("w4-max", "nvidia-modelopt 0.47.0")
    assert (result.weight_bytes, result.evaluation) == (made.weight_bytes, None)
    before = paths.action_error.stat().st_mtime_ns
    assert CliRunner().invoke(app, command).exit_code == 0
    assert paths.action_error.stat().st_mtime_ns == before
    replace(made, seconds=2.5).save(paths.baseline)
    with pytest.raises(ArtifactError, match="measured on baseline"):
        baseline_results(run.root)


def test_a_baseline_opens_as_a_policy(
    run: RunFolder, tiny_policy: OftPolicy, tiny_checkpoint: Path
) -> None:
    place = baseline_paths(run.root, "w4-max").baseline
    quantized = baseline_of(tiny_policy, to_nearest)
    quantized.save(place)
    seen = CalibrationSet.load(run.calibration).observations[0]
    source = PolicySource(str(place), checkpoint=str(tiny_checkpoint))
    opened = source()
    assert source.kind == "baseline" and source.digest(opened) == quantized.digest
    with baseline_applied(tiny_policy, quantized):
        expected = tiny_policy.infer(seen).actions
    assert opened.infer(seen).actions.tolist() == expected.tolist()
    assert expected.tolist() != tiny_policy.infer(seen).actions.tolist()
    with pytest.raises(QvlaError, match="qvla evaluate takes it with --checkpoint"):
        PolicySource(str(place))()
    with pytest.raises(QvlaError, match="must be a checkpoint, it is a baseline"):
        PolicySource(str(place), checkpoint=str(place))()


def test_the_command_names_its_tasks(run: RunFolder, tiny_checkpoint: Path) -> None:
    command = ["baseline", "max", "--run", str(run.root), "--policy", str(tiny_checkpoint)]
    outcome = CliRunner().invoke(app, [*command, "--tasks", "pull", "--episodes", "1"])
    assert isinstance(outcome.exception, QvlaError)
    assert "no task is called 'pull'" in str(outcome.exception)


def test_a_missing_environment_names_the_remedy(
    run: RunFolder, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    command = ["baseline", "gptq", "--run", str(run.root), "--policy", str(tiny_checkpoint)]
    outcome = CliRunner().invoke(app, [*command, "--environment", str(tmp_path / "none")])
    assert isinstance(outcome.exception, QvlaError)
    assert "make baselines-env" in str(outcome.exception)
    assert not baseline_paths(run.root, "w4-gptq").baseline.exists()

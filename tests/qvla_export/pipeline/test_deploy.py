"""A deployment called from a program: what it returns, and that it prints nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
from command_runs import Inputs

from calibration.calibration_set import CalibrationSet
from qvla_export.allocation.setting import parse_setting
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.deploy import Deployment, deploy
from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
from qvla_export.pipeline.progress import Progress
from qvla_export.pipeline.run_folder import RunFolder, load_if_current
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.observation import Observation


def test_a_program_deploys_on_observations_of_its_own(
    inputs: Inputs,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = RunFolder(tmp_path / "run")
    drawn = tuple(tiny_observations(8))
    CalibrationSet(drawn[:5], drawn[5:], {"mine": True}).save(run.calibration)
    request = Deployment(
        run,
        PolicySource(str(inputs.checkpoint), threads=1),
        (parse_setting("float"), parse_setting("w4")),
        check_pairs=0,
        samples=3,
    )
    heard: list[Progress] = []
    result = deploy(request, open_checkpoint(inputs.checkpoint), heard.append)
    assert capfd.readouterr() == ("", "")
    # Calibration, sensitivities, two settings, latency, report.
    assert {(p.step, p.steps) for p in heard} == {(step, 6) for step in range(1, 7)}
    assert [p.state for p in heard if p.state != "running"] == ["kept", *["made"] * 5]
    assert [row.setting for row in result.rows] == ["float", "w4"]
    plain, planned = result.rows
    assert Bundle.load(planned.bundle).digest == Bundle.load(run.bundle(request.settings[1])).digest
    assert planned.action_rms > plain.action_rms
    assert planned.layer_ratio < plain.layer_ratio == 1
    assert planned.p50_ms is not None and planned.p50_ms > 0
    assert planned.success is None and result.agreement is None
    assert result.report.is_file()


def test_a_program_may_calibrate_on_a_part_of_a_data_set(inputs: Inputs, tmp_path: Path) -> None:
    from calibration.sources.lerobot import KeyMap, LeRobotDataset

    data = LeRobotDataset(inputs.dataset, KeyMap({"image": "observation.images.image"}))
    run, request = RunFolder(tmp_path), CalibrationRequest(data, count=4, held_out=2)
    heard: list[Progress] = []
    drawn = calibrate(run, request, heard.append)
    again = calibrate(run, request, heard.append)
    assert (len(drawn.observations), len(drawn.held_out)) == (4, 2)
    assert drawn.digest == again.digest
    assert [p.state for p in heard] == ["running", "made", "kept"]


def test_an_artifact_is_loaded_if_it_is_whole_and_current(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "artifact.json"

    def load(place: Path) -> str:
        text = place.read_text()
        if "damaged" in text:
            raise ArtifactError(f"{place} is damaged")
        return text

    assert load_if_current(path, load) is None
    write_json(path, "whole")
    assert load_if_current(path, load) == path.read_text()
    assert load_if_current(path, load, lambda text: "other" in text) is None
    assert not caplog.records
    write_json(path, "damaged")
    assert load_if_current(path, load) is None
    assert "making" in caplog.text and "anew" in caplog.text

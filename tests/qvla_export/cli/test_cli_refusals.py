"""The `qvla` command given bad input, which it refuses in one line and leaves nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
from command_runs import Inputs, Outcome, listing, qvla
from tiny_policy import write_tiny_checkpoint

from qvla_export.shared.artifacts import write_json


@pytest.fixture
def run(deployed: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of a deployed run to do bad things to."""
    return shutil.copytree(deployed[0], tmp_path / "run")


def refused(run: Path, *arguments: object) -> str:
    """Return the error line of a command that must fail and change nothing."""
    before = listing(run.parent)
    outcome = qvla(*arguments)
    assert outcome.code == 2
    assert listing(run.parent) == before
    return outcome.error


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_checkpoint(run: Path, inputs: Inputs, kept: int) -> None:
    bad = shutil.copytree(inputs.checkpoint, run.parent / "bad")
    (weights,) = bad.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:kept])
    for command in (
        ("sensitivities", "--run", run),
        ("export", "--run", run, "--setting", "w4"),
        ("deploy", "--run", run, "--dataset", inputs.dataset),
    ):
        assert weights.name in refused(run, *command, "--policy", bad)


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_sensitivities(run: Path, kept: int) -> None:
    path = run / "sensitivities.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "sensitivities.safetensors" in refused(run, "plan", "--run", run, "--setting", "w4")


def test_truncated_calibration(run: Path, inputs: Inputs) -> None:
    path = run / "calibration/observations.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    error = refused(run, "sensitivities", "--run", run, "--policy", inputs.checkpoint)
    assert "qvla calibrate" in error


def test_a_plan_of_another_model(run: Path, inputs: Inputs) -> None:
    other = write_tiny_checkpoint(run.parent / "other", seed=1)
    arguments = ("export", "--run", run, "--setting", "w4", "--policy")
    digest = json.loads((run / "run.json").read_text())["policy_digest"]
    assert f"the plan was made for policy {digest[:16]}" in refused(run, *arguments, other)
    # The other way round: a foreign plan in this run.
    plan = run / "settings/w4/plan.json"
    plan.write_text(plan.read_text().replace(digest, "0" * 64))
    assert "the plan was made for policy 0000" in refused(run, *arguments, inputs.checkpoint)


def test_a_flipped_byte_in_a_bundle(run: Path, inputs: Inputs) -> None:
    bundle = run / "settings/w4/bundle"
    weights = bundle / "policy.onnx.data"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    output = run / "evaluation.json"
    for command in (
        ("verify", bundle),
        ("serve", bundle, "--port", 0),
        ("evaluate", bundle, "--output", output),
        ("evaluate", run / "settings/float/bundle", "--output", output, "--reference", bundle),
        ("profile", bundle, "--output", run / "profile.json"),
    ):
        error = refused(run, *command)
        assert "policy.onnx.data is damaged: expected SHA-256" in error
        assert "export it anew" in error


def test_a_damaged_bundle_is_exported_anew(run: Path, inputs: Inputs) -> None:
    record = "settings/w4/bundle.work"  # has the seconds it took
    before = {name: digest for name, digest in listing(run).items() if name != record}
    weights = run / "settings/w4/bundle/policy.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    done = qvla("export", "--run", run, "--setting", "w4", "--policy", inputs.checkpoint)
    assert done.code == 0, done.err
    assert {name: digest for name, digest in listing(run).items() if name != record} == before
    assert re.search(r"\d+ MatMuls.*\(0 behind MLP producers\).*multiplications removed", done.out)


UNKNOWN_NAMES = [
    (
        "sensitivities --target orion",
        "target 'orion' is unknown; there are ['cpu', 'cuda'",
    ),
    ("export --setting w4 --target orion", "target 'orion' is unknown"),
    ("deploy --target orion", "target 'orion' is unknown"),
    ("export --setting w17", "got 'w17'"),
    ("export --setting four", "a setting is 'float', 'w<mean bits>'"),
    ("deploy --settings float,w3-rtn", "uniform widths are 2, 4, 8 or 16, got 'w3-rtn'"),
    ("deploy --settings ,", "a setting is"),
    ("deploy --tasks make-tea", "no task is called 'make-tea'"),
    ("sensitivities --preset libro", "preset must be one of ['aloha', 'bridge', 'libero']"),
    ("export --setting w4 --unnorm-key tinny", "'tiny'"),
    ("deploy --unnorm-key tinny", "'tiny'"),
]


@pytest.mark.parametrize(("command", "message"), UNKNOWN_NAMES, ids=[c for c, _ in UNKNOWN_NAMES])
def test_unknown_names(run: Path, inputs: Inputs, command: str, message: str) -> None:
    arguments = (*command.split(" "), "--run", run, "--policy", inputs.checkpoint)
    assert message in refused(run, *arguments)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan --run {run} --setting w4 --target orion", "target 'orion' is unknown"),
        ("plan --run {run} --setting w0", "a setting is 'float'"),
        ("plan --run {run} --setting float", "the float setting has no plan"),
        ("calibrate --run {run} --dataset {run}/nowhere", "data set not found"),
        ("calibrate --run {run} --dataset {run}/settings", "is no recording that is read"),
        ("calibrate --run {run} --count 0", "at least 1 each, got 0, 64 and 2"),
        ("deploy --run {run} --policy {run}/nowhere", "checkpoint folder not found"),
        ("deploy --run {run} --policy {run}/settings", "is neither a checkpoint folder"),
        ("deploy --run {run} --policy {run}/settings/w4/bundle", "must be a checkpoint folder"),
        ("verify {run}/nowhere", "bundle folder not found"),
        ("serve {run}/nowhere", "URL of a server not found"),
        ("serve {run}/settings", "is neither a checkpoint folder"),
        ("serve {run}/settings/w4/bundle --host 0.0.0.0", "stay on loopback"),
        ("serve {run}/settings/w4/bundle --reply some", "reply must be one of"),
        ("serve {run}/settings/w4/bundle --port 70000", "port must be in 0..65535"),
        ("evaluate {run}/settings/w4/bundle --output {run}/e --control deaf", "control must be"),
        ("evaluate {run}/settings/w4/bundle --output {run}/e --episodes 0", "episodes >= 1"),
        ("evaluate {run}/settings/w4/bundle --output {run}/e --seed -1", "seed >= 0"),
        ("evaluate {run}/settings/w4/bundle --output {run}/e --tasks make-tea", "no task"),
        ("train {run}/nowhere {run}/trained", "data set not found"),
        ("train {run}/settings {run}/trained", "is no recording that is read"),
        ("train {run}/settings {run}/trained --precision fp8", "must be bf16 or fp32"),
    ],
)
def test_what_cannot_be_done_is_refused(run: Path, command: str, message: str) -> None:
    arguments = [word.format(run=run) for word in command.split(" ")]
    assert message in refused(run, *arguments)


def test_data_that_are_missing_leave_an_existing_run_alone(run: Path, inputs: Inputs) -> None:
    nowhere = run.parent / "nowhere"
    error = refused(
        run, "deploy", "--run", run, "--policy", inputs.checkpoint, "--dataset", nowhere
    )
    assert str(nowhere) in error


@pytest.mark.parametrize(
    ("missing", "command", "first"),
    [
        ("calibration", "sensitivities --policy {policy}", "qvla calibrate"),
        ("sensitivities.safetensors", "plan --setting w4", "qvla sensitivities"),
        ("calibration", "export --setting w4 --policy {policy}", "qvla calibrate"),
        (
            "settings/w4/plan.json",
            "export --setting w4 --policy {policy}",
            "qvla plan --setting w4",
        ),
    ],
)
def test_a_missing_artifact_names_the_command_that_makes_it(
    run: Path, inputs: Inputs, missing: str, command: str, first: str
) -> None:
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = [word.format(policy=inputs.checkpoint) for word in command.split(" ")]
    error = refused(run, *words, "--run", run)
    assert first in error
    assert str(path) in error


def test_a_folder_that_cannot_be_written_is_one_line(run: Path, inputs: Inputs) -> None:
    (run.parent / "file").write_text("not a folder")
    error = refused(
        run,
        "calibrate",
        "--run",
        run.parent / "file/run",
        "--dataset",
        inputs.dataset,
        "--count",
        6,
        "--held-out",
        6,
    )
    assert "file/run" in error


def test_deploy_refuses_a_stale_comparison_of_estimators_early(run: Path, inputs: Inputs) -> None:
    asked = {"policy_digest": "0" * 64, "calibration_digest": "0" * 64}
    stale = {"asked": asked, "pairs": [], "pairs_in_all": 0, "figures": [], "official": None}
    write_json(run / "estimators.json", stale)
    shutil.rmtree(run / "settings")
    assert "remove its estimators.json" in inputs.deploy(run).error
    assert not (run / "settings").exists()

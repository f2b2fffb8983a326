"""The `qvla` command: help, the whole way on a tiny policy, and bad input that leaves nothing."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main
from conftest import write_tiny_checkpoint
from small_datasets import write_small_dataset

from jetson.latency import LatencyComparison
from qvla_export.artifacts import sha256_file
from qvla_export.bundle import Bundle
from qvla_export.cli import main
from qvla_export.cli.commands import app
from qvla_export.run_folder import RunFolder, parse_setting

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SETTINGS = "float,w4,w4-rtn"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that an error is."""
        assert self.code != 0, self.out
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if not line.startswith(("INFO", "WARNING"))]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0]


def qvla(*arguments: object) -> Outcome:
    """Run the command in this process, as its entry point does."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qvla", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def listing(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


@dataclass(frozen=True)
class Inputs:
    checkpoint: Path
    dataset: Path

    def deploy(self, run: Path, *more: object) -> Outcome:
        return qvla(
            *("deploy", "--policy", self.checkpoint, "--dataset", self.dataset, "--run", run),
            *("--settings", SETTINGS, "--episodes", 0, "--count", 6, "--held-out", 6),
            *("--check-pairs", 6, "--samples", 5, *more),
        )


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    demos = tmp_path_factory.mktemp("cli") / "demos"
    return Inputs(tiny_checkpoint, write_small_dataset(demos, [6] * 10))


@pytest.fixture(scope="module")
def deployed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    run = tmp_path_factory.mktemp("deployed") / "run"
    return run, inputs.deploy(run)


@pytest.fixture
def run(deployed: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of a deployed run to do bad things to."""
    return shutil.copytree(deployed[0], tmp_path / "run")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_tells_every_option_with_its_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setenv("TERM", "dumb")
    shown = qvla(name, "--help")
    assert shown.code == 0
    for parameter in COMMANDS[name].params:
        if parameter.name == "help":
            continue
        assert parameter.help, f"{name} {parameter.name} says nothing"
        start = parameter.help.split("[")[0].strip()
        # A text of several lines has the frame between them.
        text = re.sub(r"[\s│]+", " ", shown.out)
        assert start in text
        if not parameter.required and parameter.default not in (None, False, ""):
            told = text.partition(start)[2].partition(" --")[0]
            # Of a switch that is on, its name is shown.
            default = parameter.name if parameter.default is True else parameter.default
            assert f"[default: {default}]" in told, f"{name} {parameter.name} hides its default"


def test_help_lists_the_commands() -> None:
    shown = qvla("--help")
    assert shown.code == 0
    assert all(name in shown.out for name in COMMANDS)


def test_deploy_makes_every_artifact(deployed: tuple[Path, Outcome], inputs: Inputs) -> None:
    run, outcome = deployed
    assert outcome.code == 0, outcome.err
    for name in ("run.json", "agreement.json", "sensitivities.safetensors", "calibration"):
        assert (run / name).exists()
    about = json.loads((run / "run.json").read_text())
    assert (about["target"], about["settings"]) == ("cpu", SETTINGS.split(","))
    folder = RunFolder(run)
    digests = set()
    for setting in map(parse_setting, SETTINGS.split(",")):
        bundle = Bundle.load(folder.bundle(setting))
        digests.add(bundle.digest)
        assert bundle.policy_digest == about["policy_digest"]
        error = json.loads(folder.action_error(setting).read_text())
        assert error["bundle_digest"] == bundle.digest
        assert error["held_out"] == 6
        assert folder.plan(setting).exists() == (setting.kind != "float")
        assert setting.name in outcome.out
    profiles = LatencyComparison.load(folder.latency).profiles
    assert [p.name for p in profiles] == ["float", "w4", "w4-rtn", "w4 unpacked", "w4 served"]
    assert {p.bundle_digest for p in profiles} == digests
    assert {len(p.samples_ms["total"]) for p in profiles} == {5}
    assert "float against quantized" in outcome.out
    assert (run / "report.html").stat().st_size > 1000
    names = [path.name for path in run.rglob("*")]
    assert not [name for name in names if name.startswith(".") or "progress" in name]


def test_deploying_again_keeps_what_is_there(
    deployed: tuple[Path, Outcome], inputs: Inputs
) -> None:
    run, first = deployed

    def times() -> dict[Path, int]:
        kept = (p for p in run.rglob("*") if p.name not in ("run.json", "report.html"))
        return {path: path.stat().st_mtime_ns for path in kept if path.is_file()}

    before, contents = times(), listing(run)
    again = inputs.deploy(run)
    assert again.code == 0, again.err
    assert times() == before
    for outcome in (first, again):
        assert "float against quantized" in outcome.out
    changed = {name for name, digest in listing(run).items() if contents[name] != digest}
    assert changed <= {"run.json", "report.html"}


def test_other_data_of_the_same_name_are_drawn_anew(
    run: Path, inputs: Inputs, tmp_path: Path
) -> None:
    same = ("calibrate", "--run", run, "--count", 6, "--held-out", 6)
    before = listing(run)
    assert qvla(*same, "--dataset", inputs.dataset).code == 0
    assert listing(run) == before
    other = write_small_dataset(tmp_path / "demos", [7] * 10)
    assert qvla(*same, "--dataset", other).code == 0
    assert listing(run / "calibration") != {
        name.removeprefix("calibration/"): digest
        for name, digest in before.items()
        if name.startswith("calibration/")
    }


def test_the_stages_one_by_one_give_what_deploy_gives(
    deployed: tuple[Path, Outcome], inputs: Inputs, tmp_path: Path
) -> None:
    run, common = tmp_path / "run", ("--run", tmp_path / "run")
    policy = ("--policy", inputs.checkpoint)
    steps = [
        ("calibrate", *common, "--dataset", inputs.dataset, "--count", 6, "--held-out", 6),
        ("sensitivities", *common, *policy, "--quantizer", "compensated"),
        ("plan", *common, "--setting", "w4"),
        ("round", *common, *policy, "--setting", "w4"),
        ("export", *common, *policy, "--setting", "w4"),
        ("verify", run / "settings/w4/bundle"),
        ("profile", run / "settings/w4/bundle", "--output", run / "profile.json", "--samples", 3),
    ]
    for step in steps:
        outcome = qvla(*step)
        assert outcome.code == 0, outcome.err
    ours, theirs = listing(run), listing(deployed[0])
    ours.pop("profile.json")
    assert ours == {name: theirs[name] for name in ours}
    assert "settings/w4/bundle/manifest.json" in ours


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
    before = listing(run)
    weights = run / "settings/w4/bundle/policy.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    done = qvla("export", "--run", run, "--setting", "w4", "--policy", inputs.checkpoint)
    assert done.code == 0, done.err
    assert listing(run) == before
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
        ("calibrate --run {run} --dataset {run}/nowhere", "nowhere/meta/info.json"),
        ("calibrate --run {run} --count 0", "at least 1 each, got 0, 64 and 2"),
        ("deploy --run {run} --policy {run}/nowhere", "is neither a checkpoint folder"),
        ("deploy --run {run} --policy {run}/settings/w4/bundle", "must be a checkpoint folder"),
        ("verify {run}/nowhere", "bundle folder not found"),
        ("serve {run}/nowhere", "is neither a checkpoint folder"),
        ("serve {run}/settings/w4/bundle --host 0.0.0.0", "stay on loopback"),
        ("serve {run}/settings/w4/bundle --reply some", "reply must be one of"),
        ("serve {run}/settings/w4/bundle --port 70000", "port must be in 0..65535"),
        ("evaluate {run}/settings/w4/bundle --output {run}/e --control deaf", "control must be"),
        ("evaluate {run}/settings/w4/bundle --output {run}/e --episodes 0", "episodes >= 1"),
        ("evaluate {run}/settings/w4/bundle --output {run}/e --seed -1", "seed >= 0"),
        ("evaluate {run}/settings/w4/bundle --output {run}/e --tasks make-tea", "no task"),
        ("train {run}/nowhere {run}/trained", "nowhere/meta/info.json"),
        ("train {run}/nowhere {run}/trained --precision fp8", "must be bf16 or fp32"),
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan"],
        ["no-such-command"],
        ["calibrate", "--run", "x", "--count", "many"],
        ["deploy", "--no-such-option"],
        [],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    outcome = qvla(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


def test_the_installed_command_exits_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "qvla_export", "verify", "a" * 200]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: bundle folder not found: aaa")


def test_an_interrupt_says_that_the_command_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bundle, "load", interrupt)
    outcome = qvla("verify", "x")
    assert outcome.code == 130
    assert "the same command continues" in outcome.err


def test_data_that_do_not_fit_the_policy_are_refused_before_the_first_stage(
    inputs: Inputs, tmp_path: Path
) -> None:
    outcome = inputs.deploy(tmp_path / "run", "--camera", "other=observation.images.image")
    assert outcome.code == 2
    assert "missing ['image']" in outcome.error
    assert "--camera NAME=COLUMN" in outcome.error
    assert not list(tmp_path.iterdir())
    outcome = inputs.deploy(tmp_path / "run", "--camera", "observation.images.image")
    assert "--camera takes NAME=COLUMN" in outcome.error


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_torch() -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("qvla_export.cli.commands.app", without_torch)
    assert "pip install 'qvla[host]'" in qvla("sensitivities").error

"""The `qvla` command: help, the whole way on a tiny policy, usage."""

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer.main
from command_runs import SETTINGS, Inputs, Outcome, listing, qvla
from places import ROOT
from small_datasets import write_small_dataset
from tiny_policy import tiny_observations

from calibration.calibration_set import CalibrationSet
from jetson.latency.comparison import LatencyComparison
from qvla_export.allocation.setting import parse_setting
from qvla_export.cli.app import app
from qvla_export.pipeline.calibrate import judging_observations
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.quantizer.plan import BitPlan
from qvla_export.report.page import write_report
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import QvlaError

GROUP = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# "bench engines" as well as "deploy".
COMMANDS = {
    " ".join([name, *inner]): command
    for name, outer in GROUP.items()
    for inner, command in (
        [([], outer)]
        if not hasattr(outer, "commands")
        else [([n], c) for n, c in outer.commands.items()]
    )
}


@pytest.fixture
def run(deployed: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of a deployed run."""
    return shutil.copytree(deployed[0], tmp_path / "run")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_tells_every_option_with_its_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setenv("TERM", "dumb")
    shown = qvla(*name.split(" "), "--help")
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


def test_help_lists_the_commands_in_panels_most_used_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setenv("TERM", "dumb")
    shown = qvla("--help")
    assert shown.code == 0
    assert shown.out == qvla("-h").out
    panels = re.findall(r"─ (\w+) ─+╮\n(.*?)╰", shown.out, re.S)
    listed = {title: re.findall(r"^│ (\S+) ", body, re.M) for title, body in panels}
    assert listed.pop("Options")
    assert {title: " ".join(names) for title, names in listed.items()} == {
        "Deploy": "deploy calibrate sensitivities plan export build verify report push release "
        "keys runtime flash",
        "Judge": "evaluate profile compare-latency tune sizes check predict",
        "Robot": "serve run replay load doctor soak robot",
        "Research": "compare estimators quantizers baseline smooth moments round activations train "
        "demonstrations bench",
    }
    timed = re.findall(r"^│ (\w+) ", qvla("bench", "-h").out, re.M)
    assert " ".join(timed) == "engines allocation weights server size rates gpu"


def test_the_version_is_that_of_the_package() -> None:
    shown = qvla("--version")
    assert (shown.code, shown.out) == (0, f"qvla {metadata.version('qvla')}\n")


def test_a_shell_can_complete_commands_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_QVLA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "qvla compare")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert sorted(qvla().out.split()) == ["compare", "compare-latency"]
    monkeypatch.setenv("COMP_WORDS", "qvla export --acc")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert qvla().out.split() == ["--accuracy-level"]


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("verify {run}/settings/w4/bundle", {"format", "passed", "versions"}),
        ("plan --run {run} --setting w4", {"plan", "ratio", "mean_bits_per_channel"}),
    ],
)
def test_json_is_one_document(run: Path, command: str, keys: set[str]) -> None:
    shown = qvla(*command.format(run=run).split(" "), "--json")
    assert shown.code == 0, shown.err
    assert set(json.loads(shown.out)) >= keys


def test_deploy_prints_its_table_as_json(run: Path, inputs: Inputs) -> None:
    shown = inputs.deploy(run, "--json")
    assert shown.code == 0, shown.err
    value = json.loads(shown.out)
    rows = {row["setting"]: row for row in value["settings"]}
    assert list(rows) == SETTINGS.split(",")
    for name, row in rows.items():
        error = json.loads((run / "settings" / name / "action_error.json").read_text())
        assert row["action_rms"] == error["rms"]
        assert Bundle.load(Path(row["bundle"])).nbytes == row["bundle_bytes"]
        assert row["success"] is None and row["p50_ms"] > 0


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


# Said anew each time, from what was kept.
REWRITTEN = {"run.json", "recommendation.json", "report.html"}


def test_deploying_again_keeps_what_is_there(
    deployed: tuple[Path, Outcome], inputs: Inputs
) -> None:
    run, first = deployed

    def times() -> dict[Path, int]:
        kept = (p for p in run.rglob("*") if p.name not in REWRITTEN)
        return {path: path.stat().st_mtime_ns for path in kept if path.is_file()}

    before, contents = times(), listing(run)
    again = inputs.deploy(run)
    assert again.code == 0, again.err
    assert times() == before
    for outcome in (first, again):
        assert "float against quantized" in outcome.out
    changed = {name for name, digest in listing(run).items() if contents[name] != digest}
    assert changed <= REWRITTEN


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
    # What it cost is another figure each time.
    ours = {name: digest for name, digest in ours.items() if not name.endswith(".work")}
    assert ours == {name: theirs[name] for name in ours}
    assert "settings/w4/bundle/manifest.json" in ours


def test_codes_are_judged_by_what_no_plan_is_made_from(
    deployed: tuple[Path, Outcome], inputs: Inputs, tmp_path: Path
) -> None:
    run = deployed[0]
    common = ("round", "--run", run, "--policy", inputs.checkpoint, "--setting", "w4")
    held_out = CalibrationSet.load(run / "calibration").held_out
    CalibrationSet(held_out[:2], held_out[2:], {"test": 1}).save(tmp_path / "others")
    for judges in (tmp_path / "others", run / "calibration"):
        outcome = qvla(*common, "--judge-by", judges)
        assert outcome.code == 0, outcome.err
        found = re.search(r"action error: RMS ([\d.]+) .* on 6 observations of", outcome.out)
        assert found is not None, outcome.out
        # Of the same observations the bundle's engine has the same error.
        measured = json.loads(RunFolder(run).action_error(parse_setting("w4")).read_text())
        assert float(found[1]) == pytest.approx(measured["rms"], abs=2e-5)


def test_cross_validation_is_kept_beside_the_plan_it_is_of(run: Path, inputs: Inputs) -> None:
    folder, w4 = RunFolder(run), parse_setting("w4")
    arguments = ("--run", run, "--policy", inputs.checkpoint, "--setting", "w4")
    outcome = qvla("round", *arguments, "--cross-validate")
    assert outcome.code == 0, outcome.err
    found = re.search(r"RMS ([\d.]+) of normalized.* \(([\d.]+) if channels", outcome.out)
    union = re.search(r"sum of parts: ([\d.]+) of modules", outcome.out)
    assert found is not None and union is not None, outcome.out
    kept = json.loads(folder.predicted_error(w4).read_text())
    assert kept["plan_digest"] == BitPlan.load(folder.plan(w4)).digest
    assert float(found[1]) == pytest.approx(kept["rms"], abs=1e-5)
    assert float(found[2]) == pytest.approx(kept["rms_of_channels"], abs=1e-5)
    assert float(union[1]) == pytest.approx(kept["union_over_modules"], abs=0.006)
    # To first order, and of other observations than those of the bundle's error.
    measured = json.loads(folder.action_error(w4).read_text())["rms"]
    assert kept["rms"] == pytest.approx(measured, rel=1.0)
    assert "What errors do to each other" in write_report(run).read_text()


def test_a_set_without_held_out_observations_does_not_judge_its_own_plans(
    inputs: Inputs, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    observations = tiny_observations(3)
    CalibrationSet(observations, (), {"test": 1}).save(run.calibration)
    judged = ("--policy", inputs.checkpoint, "--setting", "w4", "--judge-by", run.calibration)
    own = qvla("round", "--run", tmp_path, *judged)
    assert "the plans of" in own.error and "another --seed" in own.error


def test_observations_that_plans_are_made_from_judge_in_no_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, seen = RunFolder(tmp_path / "run"), tiny_observations(6)
    CalibrationSet(seen[:3], seen[3:4], {"test": 1}).save(run.calibration)
    mixed, same = tmp_path / "mixed", tmp_path / "same"
    CalibrationSet(seen[1:5], seen[5:], {"test": 2}).save(mixed)
    others = judging_observations(run, mixed)
    assert [o.state.tolist() for o in others] == [o.state.tolist() for o in seen[3:]]
    assert "2 of 5 observations" in caplog.text
    CalibrationSet(seen[:2], seen[2:3], {"test": 3}).save(same)
    with pytest.raises(QvlaError, match=r"the plans of .* are made from all of"):
        judging_observations(run, same)


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
    outcome = qvla("verify", ROOT)
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
    def without_torch(prog_name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("qvla_export.cli.app.app", without_torch)
    assert "pip install 'qvla[host]'" in qvla("sensitivities").error

"""A report of hostile, incomplete, damaged and foreign artifacts."""

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import SETTINGS, TASKS, Outline, edit_json

from qvla_export.report.page import write_report
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>$\\frac{1}{$'


@pytest.fixture
def run(pristine_report_run: Path, tmp_path: Path) -> Path:
    """A copy of the run folder to damage."""
    ignored = shutil.ignore_patterns("report.html")
    return Path(shutil.copytree(pristine_report_run, tmp_path / "run", ignore=ignored))


def test_hostile_names_stay_text(run: Path) -> None:
    edit_json(run / "run.json", policy=HOSTILE, command=HOSTILE, machine={HOSTILE: HOSTILE})
    _rename_setting(run, "w4", HOSTILE.replace("/", ""))
    _rename_tasks(run / "settings/float/evaluation.json", HOSTILE)
    written = write_report(run).read_text()
    tags = Outline(written).tags
    assert not any(tag in ("script", "img") for tag, _ in tags)
    assert "&lt;script&gt;" in written


def test_missing_pieces_are_named_with_their_command(run: Path) -> None:
    shutil.rmtree(run / "controls")
    for name in ("agreement.json", "latency.json"):
        (run / name).unlink()
    for name in SETTINGS:
        (run / "settings" / name / "evaluation.json").unlink()
        (run / "settings" / name / "action_error.json").unlink()
    (run / "calibration/calibration.json").unlink()
    (run / "recommendation.json").unlink()
    written = html.unescape(write_report(run).read_text())
    for command in (
        f"qvla sensitivities --run {run} --policy <checkpoint> --check-pairs",
        f"qvla evaluate {run}/settings/float/bundle --reference <checkpoint> --output",
        f"qvla evaluate {run}/settings/float/bundle --control blank-image --output",
        f"qvla deploy --policy <checkpoint> --run {run}",
        f"qvla calibrate --run {run}",
    ):
        assert f"<code>{command}" in written
    assert written.count("<figure") == 5


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run.json", {"settings": []}),
        ("run.json", {"settings": ["../other"]}),
        ("run.json", {"machine": 3}),
        ("agreement.json", {"pairs": [["layer", 1]]}),
        ("latency.json", {"profiles": [{"name": "float"}]}),
        ("latency.json", {"format": "qvla.latency/1"}),
        ("latency.json", {"deadline": {"rate_hz": 0, "execute": 1}}),
        ("latency.json", {"deadline": 60}),
        ("settings/w4/action_error.json", {"rms": "much"}),
        ("settings/w4/action_error.json", {"rms": float("nan")}),
        ("settings/w4/action_error.json", {"mean_abs_physical": [1.0]}),
        ("settings/w4/evaluation.json", {"results": []}),
        ("settings/w4/evaluation.json", {"results": [{"task": "drawer-open"}]}),
        ("controls/blank-image.json", {"config": None}),
    ],
)
def test_damaged_values_are_artifact_errors(run: Path, name: str, damage: dict[str, Any]) -> None:
    edit_json(run / name, **damage)
    with pytest.raises(ArtifactError, match=Path(name).name):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "name",
    ["run.json", "agreement.json", "latency.json", "settings/w8/evaluation.json"],
)
def test_truncated_json_is_an_artifact_error(run: Path, name: str) -> None:
    path = run / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtifactError, match="not valid JSON"):
        write_report(run)


@pytest.mark.parametrize(
    "name",
    ["run.json", "sensitivities.safetensors", "settings/w4/plan.json", "settings/w4/bundle"],
)
def test_required_artifacts_are_named_when_missing(run: Path, name: str) -> None:
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ArtifactError, match=re.escape(str(path))):
        write_report(run)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("run.json", {"policy_digest": "0" * 64}),
        ("agreement.json", {"sensitivities_digest": "0" * 64}),
        ("settings/w4/action_error.json", {"bundle_digest": "0" * 64}),
        ("settings/w4/evaluation.json", {"digest": "0" * 64}),
        ("settings/w4/plan.json", {"budget": "another"}),
    ],
)
def test_artifacts_of_other_runs_are_refused(run: Path, name: str, change: dict[str, Any]) -> None:
    edit_json(run / name, **change)
    with pytest.raises(ArtifactMismatch, match="do not belong together"):
        write_report(run)


def _rename_setting(run: Path, old: str, new: str) -> None:
    (run / "settings" / old).rename(run / "settings" / new)
    names = json.loads((run / "run.json").read_text())["settings"]
    edit_json(run / "run.json", settings=[new if name == old else name for name in names])
    latency = json.loads((run / "latency.json").read_text())
    for item in _named(latency):
        item["name"] = new if item["name"] == old else item["name"]
    (run / "latency.json").write_text(json.dumps(latency))


def _named(latency: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from latency["profiles"]
    yield from latency["ratios"]


def _rename_tasks(path: Path, new: str) -> None:
    text = path.read_text()
    path.write_text(text.replace(json.dumps(TASKS[0]), json.dumps(new)))

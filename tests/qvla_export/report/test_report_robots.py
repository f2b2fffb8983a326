"""What robots measured of a run's bundles, on its page beside what was predicted."""

import html
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_runs import qvla
from fake_orin import FakeOrin

from jetson.latency.robot_profile import RobotProfile
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.profile import ProfileRequest
from qvla_export.pipeline.robot.board_profile import RobotProfileRequest, profile_robot
from qvla_export.pipeline.robot.run_report import report_run
from qvla_export.report import page
from qvla_export.report.robots import read_robots, robot_table
from qvla_export.report.run_data import read_run
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch

TABLE = "On robots: measured beside predicted"


@pytest.fixture(scope="module")
def from_robot(pristine_report_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one file that an Orin, which got hot, made of two bundles."""
    root = tmp_path_factory.mktemp("robot")
    fake = FakeOrin(root / "orin")
    places = [str(pristine_report_run / "settings" / name / "bundle") for name in ("float", "w4")]
    wanted = ProfileRequest(tuple(PolicySource(p, threads=1) for p in places), 20, 1)
    request = RobotProfileRequest(wanted, board=fake.board(fake.warm), period_s=0.05)
    profile_robot(request, root / "bench-3.json")
    return root / "bench-3.json"


@pytest.fixture
def run(pristine_report_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_report_run, tmp_path / "run"))


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the page out, which takes seconds: its table is read without it."""
    monkeypatch.setattr(page, "write_report", lambda run: run)


def rows_of(run: Path) -> dict[str, str]:
    """Return the rows of the table by setting, each in one text."""
    table = robot_table(read_robots(run))
    return {row[0].text: " | ".join(f"{c.text} {c.note}" for c in row) for row in table.rows}


@pytest.mark.usefixtures("no_page")
@pytest.mark.usefixtures("empty_figures")
def test_what_a_robot_measured_is_told(run: Path, from_robot: Path) -> None:
    assert not rows_of(run)
    report_run(run, [from_robot])
    profile, rows = RobotProfile.load(from_robot), rows_of(run)
    for one, setting in zip(profile.comparison.profiles, ("float", "w4"), strict=True):
        (start,) = profile.comparison.cold_starts[one.name]
        for word in (
            "bench-3", "Jetson AGX Orin", "JetPack 6.2, MAXN", "clocks held", "gpu-throttle",
            f"{one.percentile_ms(50):.2f} ms", f"{(start.resident_bytes or 0) / 1e6:.0f} MB",
        ):  # fmt: skip
            assert word in rows[setting], word


@pytest.mark.usefixtures("no_page")
@pytest.mark.usefixtures("empty_figures")
def test_predictions_stand_beside_it(run: Path, from_robot: Path, tmp_path: Path) -> None:
    measured = RobotProfile.load(from_robot)
    # As if these bundles had been the Orin's.
    profiles = tuple(replace(p, target="orin-jp6") for p in measured.comparison.profiles)
    orin = replace(measured, comparison=replace(measured.comparison, profiles=profiles))
    orin.save(tmp_path / "orin.json")
    report_run(run, [tmp_path / "orin.json"])
    rows = rows_of(run)
    stored = json.loads((run / "robots/orin.json").read_text())
    for profile, weights in zip(profiles, ("float", "plan"), strict=True):
        row = stored["predicted"][profile.name]
        table = rows[stored["settings"][profile.name]]
        assert (row["weights"], row["power_mode"]) == (weights, "MAXN")
        assert f"{row['predicted_ms']:.3g} ms" in table
        assert f"{profile.percentile_ms(50) / row['predicted_ms']:.2f}×" in table


@pytest.mark.usefixtures("empty_figures")
def test_a_machine_that_is_no_board_says_so(run: Path, tmp_path: Path) -> None:
    output, bundle = tmp_path / "here.json", run / "settings/w4/bundle"
    words = ("robot", "profile", bundle, "--output", output, "--samples", 20, "--warmup", 1)
    done = qvla(*words, "--threads", 1)
    assert done.code == 0, done.err
    assert "note: no board: " in done.out and "memory, MB" in done.out
    value = json.loads(output.read_text())
    assert (value["format"], value["clocks"]) == ("qvla-robot-profile-1", "no board")
    shown = qvla("report", run, "--robot", output)
    assert shown.code == 0, shown.err
    text = html.unescape((run / "report.html").read_text())
    table = text[text.index(TABLE) : text.index("</table>", text.index(TABLE))]
    assert "clocks no board" in table and "<span>w4</span>" in table


def test_bundles_of_another_run_are_refused(run: Path, from_robot: Path, tmp_path: Path) -> None:
    measured = RobotProfile.load(from_robot)
    first, second = measured.comparison.profiles
    other = replace(measured.comparison, profiles=(first, replace(second, bundle_digest="0" * 64)))
    replace(measured, comparison=other).save(tmp_path / "orin.json")
    with pytest.raises(ArtifactMismatch, match="no bundles of"):
        report_run(run, [tmp_path / "orin.json"])
    assert not (run / "robots").exists()


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda v: v.update(format="qvla-robot-profile-2"),
    "clocks": lambda v: v.update(clocks="held by hand"),
    "no GPU": lambda v: v.pop("gpu"),
    "date": lambda v: v.update(created=3),
    "zones": lambda v: v["time"].update(hottest_c=[1]),
    "no samples": lambda v: v["time"].pop("samples"),
    "no profiles": lambda v: v["comparison"].update(profiles=[]),
    "no board": lambda v: v["comparison"]["profiles"][0].update(board_before={}),
    "no run": lambda v: v.update(comparison=3),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_refused(what: str, from_robot: Path, tmp_path: Path) -> None:
    value = json.loads(from_robot.read_text())
    DAMAGE[what](value)
    (tmp_path / "orin.json").write_text(json.dumps(value))
    with pytest.raises(ArtifactError):
        RobotProfile.load(tmp_path / "orin.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "qvla-robot-report-1"}'])
def test_a_damaged_file_in_the_run_is_refused(text: str, run: Path) -> None:
    (run / "robots").mkdir()
    (run / "robots/orin.json").write_text(text)
    with pytest.raises(ArtifactError):
        read_run(run)

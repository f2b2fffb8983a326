"""The page leads with the recommendation, has contents, and misses only what it could have."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_runs import NAMES, SETTINGS, Outline, edit_json

from qvla_export.report.missing import missing_artifacts
from qvla_export.report.page import write_report
from qvla_export.report.run_data import read_run
from qvla_export.report.svg import setting_looks
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch


@pytest.fixture
def run(pristine_report_run: Path, tmp_path: Path) -> Path:
    """A copy of the run folder to change."""
    ignored = shutil.ignore_patterns("report.html")
    return Path(shutil.copytree(pristine_report_run, tmp_path / "run", ignore=ignored))


@pytest.fixture(scope="module")
def page(pristine_report_run: Path) -> str:
    """The page of the unchanged run."""
    return html.unescape(write_report(pristine_report_run).read_text()).replace("\u00a0", " ")


def value_of(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "recommendation.json").read_text())
    return value


def test_the_page_leads_with_the_recommendation(page: str, pristine_report_run: Path) -> None:
    value = value_of(pristine_report_run)
    lead = re.search(r'<p class="lead">(.*?)</p>', page)
    assert lead is not None and lead[1] == value["sentences"][0]
    assert lead[1].startswith("Take w4: the smallest setting under every bound.")
    assert page.index(lead[1]) < page.index("<h2>")
    for text in (*value["sentences"], *value["warnings"], *(b["text"] for b in value["bounds"])):
        assert text in page
    for command in value["commands"]:
        assert f"<code>{command['line']}</code>" in page


def test_errors_against_demonstrations_stand_beside_every_setting(
    page: str, pristine_report_run: Path
) -> None:
    value = value_of(pristine_report_run)
    table = page[page.index("translation: error, mm") :].split("</table>")[0]
    plain = value["float_policy"]["groups"]["translation"]["error"]
    assert f"<span>{plain['median']:.3g}</span><small>9 in 10: {plain['p90']:.3g}</small>" in table
    for row in value["settings"]:
        found = table[table.index(f"<span>{row['setting']}</span>") :].split("</tr>")[0]
        for group, added in row["added"].items():
            assert f"<span>{added:.2g}</span>" in found
            error = row["open_loop"]["groups"][group]["error"]
            assert f"9 in 10: {error['p90']:.3g}" in found
        assert ("over the bound" in found) == bool(row["exceeds"])


@pytest.mark.usefixtures("empty_figures")
def test_contents_lead_to_sections(page: str, run: Path) -> None:
    (run / "recommendation.json").unlink()
    for text in (page, write_report(run).read_text()):
        tags = Outline(text).tags
        anchors = [a["href"] for tag, a in tags if tag == "a"]
        sections = {f"#{a['id']}" for tag, a in tags if tag in ("section", "footer") and "id" in a}
        assert len(anchors) >= 5 and set(anchors) == sections


def test_traces_name_every_number_of_the_action(page: str) -> None:
    figure = page[page.index("<h3>Action traces</h3>") :].split("</figure>")[0]
    for text in (*(f"{name}, mm" for name in NAMES[:3]), "gripper, units"):
        assert f">{text}</text>" in figure or text in figure
    for name in ("demonstrated", "float policy", "w4", "w4-rtn", "w8"):
        assert f">{name}</text>" in figure
    table = page[page.index("Action error by dimension") :]
    assert all(f'<th scope="col">{name}</th>' in table for name in NAMES)


@pytest.mark.usefixtures("empty_figures")
def test_what_a_run_cannot_have_is_not_missed(run: Path) -> None:
    """A data set's run for an Orin: no episodes, no controls, no latency here."""
    shutil.rmtree(run / "controls")
    for name in ("latency.json", "agreement.json"):
        (run / name).unlink()
    for name in SETTINGS:
        (run / "settings" / name / "evaluation.json").unlink()
    edit_json(run / "calibration/calibration.json", source={"dataset": "mine"})
    edit_json(run / "run.json", stages={"agreement": False, "episodes": False, "latency": False})
    page = write_report(run).read_text()
    # Exact sensitivities were not asked for, but can be had.
    assert page.count("Not in this run") == 1 and "--check-pairs" in page
    assert '<p class="missing">Not in this run' not in page
    for gone in ("Solved episodes", "solved episodes", "Latency ratio", "Controls:"):
        assert gone not in page
    # Of a run whose stages nobody wrote down, the simulator is no part if it drew from data.
    edit_json(run / "run.json", stages={})
    missing = missing_artifacts(read_run(run))
    assert set(missing) == {"agreement", "latency"}
    assert all(piece.is_due for pieces in missing.values() for piece in pieces)


@pytest.mark.usefixtures("empty_figures")
def test_what_a_run_was_to_have_is_missed_in_one_line_each(run: Path) -> None:
    shutil.rmtree(run / "controls")
    (run / "latency.json").unlink()
    for name in SETTINGS:
        (run / "settings" / name / "evaluation.json").unlink()
    page = write_report(run).read_text()
    assert page.count('<p class="missing">Not in this run') == 3
    assert "closed-loop episodes of float, w8, w4, w4-rtn" in page
    assert "latency of float, w8, w4, w4-rtn" in page


@pytest.mark.parametrize(
    "change",
    [
        {"format": "another"},
        {"settings": []},
        {"settings": [{"setting": "w4"}]},
        {"float_policy": {"groups": {}}},
        {"bounds": [{"group": "translation", "value": 1.0}]},
        {"traces": {"actions": {"float policy": [[[1.0, 2.0]]]}}},
        {"traces": {"actions": {"float policy": "much"}}},
        {"commands": ["serve"]},
        {"action": {"names": ["x"], "units": []}},
    ],
)
def test_a_damaged_recommendation_is_named(run: Path, change: dict[str, Any]) -> None:
    edit_json(run / "recommendation.json", **change)
    with pytest.raises(ArtifactError, match=r"recommendation\.json"):
        write_report(run)


def test_a_recommendation_of_other_bundles_is_refused(run: Path) -> None:
    value = value_of(run)
    value["settings"][1]["bundle_digest"] = "0" * 64
    edit_json(run / "recommendation.json", settings=value["settings"])
    with pytest.raises(ArtifactMismatch, match="recommendation and bundle w8"):
        write_report(run)
    edit_json(run / "recommendation.json", calibration_digest="0" * 64)
    with pytest.raises(ArtifactMismatch, match="recommendation and calibration set"):
        write_report(run)


def test_twelve_settings_look_different() -> None:
    names = ["float", *(f"w{i}" for i in range(12))]
    looks = setting_looks(names, ["float"])
    assert len({(look.color, look.dashes) for look in looks.values()}) == 13
    assert len({(look.color, look.marker) for look in looks.values()}) == 13
    assert len({look.marker for look in looks.values()}) == 12  # float shares one, in grey

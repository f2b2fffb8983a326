"""How well sensitivities are known, on the page: standard errors, estimators side by side."""

import html
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from report_runs import edit_json

from qvla_export.report.page import write_report
from qvla_export.sensitivity.estimator_comparison import (
    EstimatorComparison,
    EstimatorScore,
    OfficialTime,
)
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.artifacts import read_json, write_json
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch


@pytest.fixture
def run(pristine_report_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_report_run, tmp_path / "run"))


def compared(run: Path) -> EstimatorComparison:
    measured = Sensitivities.load(run / "sensitivities.safetensors")
    asked = {
        "policy_digest": measured.policy_digest,
        "calibration_digest": measured.calibration_digest,
    }
    exact = EstimatorScore(
        "exact", "exact", {}, 32, 1.0, {"2": 1.0, "4": 1.0}, 5.0, 37010.4, True, None, [1.0, 2.0]
    )
    by_width = {"2": 0.9912, "4": 0.9876}
    ours = EstimatorScore(
        "first-order", "full", {}, 32, 0.9981, by_width, 2.9, 2.9, False, 350_000_000, [1.0, 2.0]
    )
    official = OfficialTime("first-order", 32, 66.0, [5.0, 6.0, 7.0], 60.0, [5.0, 5.0, 9.0])
    pairs = [("layer", 0, 2), ("layer", 1, 4)]
    return EstimatorComparison(asked, pairs, 74752, (exact, ours), official)


def shown(run: Path) -> str:
    return html.unescape(write_report(run).read_text())


@pytest.mark.usefixtures("empty_figures")
def test_estimators_are_shown_where_they_were_compared(run: Path) -> None:
    assert "Estimators of sensitivities" not in shown(run)
    compared(run).save(run / "estimators.json")
    page = shown(run)
    row = page[page.index("<span>first-order</span>") :].split("</tr>")[0]
    cells = re.findall(r"<span>(.*?)</span>", row)
    assert cells == ["first-order", "0.9981", "0.9876", "2.9", "350 MB"]
    row = page[page.index("<span>exact</span>") :].split("</tr>")[0]
    assert "37,010.4" in row and "scaled from the pairs" in row and "<span>–</span>" in row
    assert "2 of 74,752 (channel, width) pairs" in page
    assert "takes 11.0 times as long as first-order (12.0 in CPU time)" in page


@pytest.mark.parametrize(
    "damage",
    [
        {"figures": [{"name": "first-order"}]},
        {"figures": 3},
        {"asked": []},
        {"official": {"estimator": "first-order"}},
        {"pairs_in_all": "many"},
    ],
)
def test_damaged_comparisons_of_estimators(run: Path, damage: dict[str, Any]) -> None:
    path = run / "estimators.json"
    compared(run).save(path)
    edit_json(path, **damage)
    with pytest.raises(ArtifactError, match=r"estimators\.json is damaged"):
        write_report(run)


@pytest.mark.parametrize("digest", ["policy_digest", "calibration_digest"])
def test_estimators_of_another_run_are_refused(run: Path, digest: str) -> None:
    path = run / "estimators.json"
    compared(run).save(path)
    value = read_json(path, "comparison")
    write_json(path, {**value, "asked": {**value["asked"], digest: "0" * 64}})
    with pytest.raises(ArtifactMismatch, match="do not belong together"):
        write_report(run)


@pytest.mark.usefixtures("empty_figures")
def test_standard_errors_are_shown_by_width(run: Path) -> None:
    measured = Sensitivities.load(run / "sensitivities.safetensors")
    page = shown(run)
    assert measured.standard_error is not None
    for name, spread in measured.standard_error.by_width.items():
        row = page[page.index(f"<span>{name}</span>") :].split("</tr>")[0]
        expected = [f"{100 * error:.0f} %" for error in spread.error]
        assert re.findall(r"<span>(.*?)</span>", row) == [name, *expected]
        shares = [min(1, (p / e) ** 2) for p, e in zip(spread.by_probes, spread.error, strict=True)]
        assert all(f"probes: {100 * share:.0f} %" in row for share in shares)

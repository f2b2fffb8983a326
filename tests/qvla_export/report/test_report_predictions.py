"""The report's table of what errors do to each other: shown where it was measured, and checked."""

import html
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from report_runs import Outline, edit_json

from qvla_export.pipeline.deployment.cross_validation import CrossValidatedError
from qvla_export.quantizer.plan import BitPlan
from qvla_export.report.page import render, write_report
from qvla_export.report.run_data import RunData, read_run
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch

HEADING = "What errors do to each other"
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def run(pristine_report_run: Path, tmp_path: Path) -> Path:
    """A run whose w4 was cross-validated."""
    ignored = shutil.ignore_patterns("report.html")
    copy = Path(shutil.copytree(pristine_report_run, tmp_path / "run", ignore=ignored))
    plan = BitPlan.load(copy / "settings/w4/plan.json")
    union = {"Language MLP": 1.31, HOSTILE: 0.87}
    found = CrossValidatedError(plan.digest, "calibration-digest", 0.0246, 0.0201, 1.234, union)
    write_json(copy / "settings/w4/predicted_error.json", asdict(found))
    return copy


@pytest.fixture
def data(run: Path) -> RunData:
    return read_run(run)


@pytest.mark.usefixtures("empty_figures")
def test_the_table_has_the_artifacts_numbers(data: RunData) -> None:
    page = render(data)
    assert not any(tag == "script" for tag, _ in Outline(page).tags)
    table = html.unescape(page)[html.unescape(page).index(HEADING) :].split("</table>")[0]
    assert "union error over the sum of its parts" in table
    for text in ("Language MLP", HOSTILE, "0.0246", "0.0201 if channels", "1.23", "1.31", "0.87"):
        assert text in table
    # The invented measured error of w4 is 0.0123 x 16 / 4 bits.
    measured = next(s.action_error for s in data.settings if s.name == "w4")
    assert measured is not None
    assert f"{measured.rms / 0.0246:.2f}×" in table
    assert "w8" not in table.split("<tbody>")[1]


@pytest.mark.usefixtures("empty_figures")
def test_without_the_step_there_is_no_table(data: RunData) -> None:
    bare = tuple(replace(setting, predicted_error=None) for setting in data.settings)
    assert HEADING not in render(replace(data, settings=bare))


def test_predictions_of_other_plans_are_refused(run: Path) -> None:
    path = run / "settings/w4/predicted_error.json"
    for other in ("w8", "float"):
        moved = run / "settings" / other / path.name
        shutil.copy(path, moved)
        with pytest.raises(ArtifactMismatch, match=rf"{other} do not belong.*--cross-validate"):
            write_report(run)
        moved.unlink()
    edit_json(path, rms=float("nan"))
    with pytest.raises(ArtifactError, match=r"predicted_error\.json: NaN is no JSON number"):
        write_report(run)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="lacks"):
        write_report(run)

"""The page's table of motion and of errors on policy."""

import numpy as np
import pytest

from qvla_export.report.cells import NONE
from qvla_export.report.motion import motion_of, motion_table

ROW = {
    "success": True,
    "steps": 20,
    "deviations": [0.5, 0.25],
    "phases": ["approach", "insert"],
    "motion": {
        "jerk_rms": 100.0,
        "jerk_p99": 300.0,
        "gripper_flips": 1,
        "seam_jumps_mm": [3.0, 4.0],
    },
}
LOST = {
    **ROW,
    "success": False,
    "steps": 99,
    "deviations": [1.5],
    "phases": ["approach"],
    "motion": {**ROW["motion"], "jerk_rms": 200.0, "gripper_flips": 4, "seam_jumps_mm": []},
}


def test_figures_are_of_the_raw_episodes() -> None:
    found = motion_of([ROW, LOST])
    assert (found.steps_to_success, found.jerk, found.gripper_flips) == (20.0, (150.0, 300.0), 2.5)
    assert found.seams_mm == pytest.approx((np.sqrt(12.5), 3.99))
    assert found.on_policy == 0.75 and found.by_phase == {"approach": 1.0, "insert": 0.25}
    table = motion_table({"w4": found}, {"w4": 0.5})
    assert table.columns[-2:] == ("in approach", "in insert")
    ((name, steps, jerk, flips, seams, on_policy, *phases),) = table.rows
    assert (name.text, steps.text, flips.text) == ("w4", "20.00", "2.50")
    assert (jerk.text, jerk.note, seams.text) == ("150", "99 % 300", "3.54")
    assert (on_policy.text, on_policy.note) == ("0.75", "1.50× held-out")
    assert [cell.text for cell in phases] == ["1", "0.25"]


def test_what_was_not_recorded_is_not_shown() -> None:
    before = {"success": False, "steps": 9, "deviations": [], "motion": None}
    assert motion_table({"w4": motion_of([before, ROW])}, {}).rows == ()
    bare = motion_of([{**ROW, "deviations": [], "phases": [], "success": False}])
    (row,) = motion_table({"w4": bare}, {"w4": 0.5}).rows
    assert [row[1].text, row[5].text] == [NONE, NONE]

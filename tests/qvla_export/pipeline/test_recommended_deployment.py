"""`qvla deploy` to its end: what it recommends for this machine's target and for another's."""

import json
import shlex
from pathlib import Path

import pytest
from command_runs import Inputs, Outcome, qvla


def test_a_deployment_ends_with_what_to_take_and_type(deployed: tuple[Path, Outcome]) -> None:
    run, outcome = deployed
    value = json.loads((run / "recommendation.json").read_text())
    # The small data set names its actions action_0 and so on: that is no name.
    assert value["action"]["names"][0] == "dimension 0"
    (bound,) = value["bounds"]
    own = value["float_policy"]["groups"]["other"]["error"]["median"]
    assert bound["value"] == pytest.approx(own / 10)
    for row in value["settings"]:
        assert (row["added"]["other"] > bound["value"]) == (row["exceeds"] == ["other"])
        assert row["open_loop"]["groups"]["other"]["error"]["median"] > 0
        assert row["time"]["measured"]
    fitting = [r for r in value["settings"] if not r["is_float"] and not r["exceeds"]]
    expected = min(fitting, key=lambda r: r["bundle_bytes"])["setting"] if fitting else None
    assert value["setting"] == expected
    for text in (*value["sentences"], *(command["line"] for command in value["commands"])):
        assert text in outcome.out


def test_for_a_target_elsewhere_time_is_predicted_and_commands_are_the_robots(
    inputs: Inputs, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outcome = qvla(
        *("deploy", "--policy", inputs.checkpoint, "--dataset", inputs.dataset, "--run", run),
        *("--settings", "float,w8-rtn", "--count", 2, "--held-out", 4, "--check-pairs", 0),
        *("--target", "orin-jp7", "--action-names", "x,y,z,gripper", "--unit-mm", 1000),
        *("--tolerance-mm", 1e6, "--tolerance-gripper", 1e6, "--json"),
    )
    assert outcome.code == 0, outcome.err
    value = json.loads(outcome.out)["recommendation"]
    assert value["setting"] == "w8-rtn" and "traces" not in value
    assert [bound["quantile"] for bound in value["bounds"]] == ["p90", "p90"]
    times = [row["time"] for row in value["settings"]]
    assert all(not time["measured"] and time["low_ms"] < time["ms"] for time in times)
    assert "predicted to take" in value["sentences"][1]
    lines = [(command["where"], shlex.split(command["line"])) for command in value["commands"]]
    tools = [(where, words[1] if words[0] == "qvla" else "copy") for where, words in lines]
    robot = [("robot", name) for name in ("build", "verify", "serve")]
    assert tools == [("here", "check"), ("here", "copy"), *robot]
    # What is said to work here, does.
    checked = qvla(*lines[0][1][1:])
    assert checked.code == 0, checked.err
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert stages == {"agreement": False, "episodes": False, "latency": False}
    page = (run / "report.html").read_text()
    assert '<p class="missing">Not in this run' not in page


def test_a_tolerance_in_unknown_units_is_refused_before_any_work(
    inputs: Inputs, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start = ("deploy", "--policy", inputs.checkpoint, "--dataset", inputs.dataset, "--run", run)
    refused = qvla(*start, "--tolerance-mm", 1, "--action-names", "x,y,z,gripper")
    assert "--unit-mm (1000 for metres" in refused.error and not run.exists()
    refused = qvla(*start, "--action-names", "x,y")
    assert "have 4 numbers, --action-names names 2" in refused.error and not run.exists()

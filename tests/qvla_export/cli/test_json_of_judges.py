"""`--json` of the commands that judge: stdout is one JSON document, whatever else is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_runs import Inputs, Outcome, qvla


def document(outcome: Outcome) -> Any:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.fixture
def bundle(deployed: tuple[Path, Outcome]) -> Path:
    return deployed[0] / "settings" / "w4" / "bundle"


def test_predictions(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "predicted.json"
    # For a target whose rates are published, not measured.
    command = ("predict", "--geometry", "openvla-7b", "--target", "rtx4070", "--output", output)
    shown = document(qvla(*command, "--json"))
    assert shown == json.loads(output.read_text())
    assert {row["weights"] for row in shown["rows"]} == {"float", "plan"}


def test_findings(bundle: Path) -> None:
    shown = document(qvla("check", bundle, "--json"))
    assert (shown["target"], shown["errors"], shown["findings"]) == ("cpu", 0, [])
    wrong = qvla("check", bundle, "--target", "orin-jp7", "--json")
    assert wrong.code == 2
    assert "bundle.target" in {finding["rule"] for finding in json.loads(wrong.out)["findings"]}


def test_sizes(bundle: Path, tmp_path: Path) -> None:
    (sizes,) = document(qvla("sizes", bundle, "--json"))["bundles"]
    assert sizes["planned_bytes"] > 0 and sizes["engine_missing"]


def test_latencies(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "latency.json"
    profiled = qvla("profile", bundle, "--output", output, "--samples", 3, "--json")
    assert document(profiled) == json.loads(output.read_text())
    assert "latency" in profiled.err
    unwritten = document(qvla("profile", bundle, "--samples", 3, "--json"))
    assert unwritten.keys() == document(profiled).keys()
    (change,) = document(qvla("compare-latency", output, output, "--json"))["changes"]
    assert change["slower"] is False


def test_quantizers(deployed: tuple[Path, Outcome], inputs: Inputs, tmp_path: Path) -> None:
    output = tmp_path / "quantizers.json"
    command = ("quantizers", "--run", deployed[0], "--policy", inputs.checkpoint, "--bits", 3)
    shown = document(qvla(*command, "--output", output, "--json"))
    assert shown == json.loads(output.read_text())
    errors = {row["quantizer"]: row["rms"] for row in shown["rows"]}
    assert 0 < errors["inputs and channels"] < errors["nearest"]
    assert {row["mean_bits"] for row in shown["rows"]} == {"3"}

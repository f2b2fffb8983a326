"""`qvla predict`, and `qvla plan` under a limit on the predicted latency."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_runs import qvla
from small_latency_models import SMALL, model_of, small_sensitivities

from engines.bench.published_actions import published_actions
from engines.targets import ORIN_JP7
from qvla_export.allocation.setting import parse_setting
from qvla_export.latency_model.network_shape import network_of
from qvla_export.pipeline.predict import PredictedAction
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.policies.oft.config import OftConfig
from qvla_export.quantizer.plan import BitPlan
from qvla_export.shared.policy_interface import save_policy_config


def test_the_command_labels_everything_as_predicted(tmp_path: Path) -> None:
    output = tmp_path / "predicted.json"
    shown = qvla(
        "predict", "--geometry", "openvla-oft-7b", "--bits", "8:0.5,4:0.4,0:0.1", "--output", output
    )
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert "predicted, not measured" in lines[0]
    rows = [line for line in lines if " ms " in line]
    predicted = [row for row in rows if "published" not in row]
    # The float graph, and each form of the plan's products without rounded inputs.
    assert len(predicted) == 3 * len(ORIN_JP7.power_modes)
    assert all("predicted" in row for row in predicted)
    # What others measured of other policies is told apart.
    assert len(rows) - len(predicted) == len(published_actions(ORIN_JP7)) == 4
    content = json.loads(output.read_text())
    stored = content["rows"]
    assert all(row["low_ms"] < row["predicted_ms"] < row["high_ms"] for row in stored)
    one = qvla("predict", "--geometry", "openvla-7b", "--target", "rtx4070", "--power-mode", "200W")
    assert one.code == 0 and one.out.count("predicted ") == 3 and "published" not in one.out
    rounded = qvla(
        *("predict", "--geometry", "openvla-oft-7b", "--bits", "8:0.3,4:0.6,0:0.1", "--json"),
        *("--activations", "int8", "--power-mode", "MAXN"),
    )
    found = {row["form"]: row for row in json.loads(rounded.out)["rows"]}
    assert list(found) == ["float", "dequantized", "expanded", "kernel"]
    assert found["expanded"]["float_share"] < found["dequantized"]["float_share"] < 1
    assert found["kernel"]["weight_bytes"] < found["expanded"]["weight_bytes"]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with sensitivities, and beside it what a checkpoint says of its inputs."""
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    small_sensitivities().save(folder.sensitivities)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_policy_config(OftConfig(("one", "two"), 4, 7, 8, "q99"), checkpoint)
    preprocessor = {
        "input_sizes": [[3, 56, 56]] * 2,
        "image_resize_strategy": "resize-naive",
        "interpolations": ["bicubic"] * 2,
        "means": [[0.5] * 3] * 2,
        "tvf_normalize_params": [{"mean": [0.5] * 3, "std": [0.5] * 3}] * 2,
    }
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "openvla"}))
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def test_a_planned_setting_keeps_the_limit_of_the_command(run: RunFolder) -> None:
    setting = parse_setting("w8")
    arguments = ["plan", "--run", run.root, "--setting", "w8", "--target", "orin-jp7"]
    free = qvla(*arguments)
    assert free.code == 0, free.err
    assert "at least" in free.out and "predicted" not in free.out
    prompt = replace(SMALL.inputs, prompt_tokens=30)
    model = model_of(network_of(SMALL.layers, prompt))
    before = model.predict(BitPlan.load(run.plan(setting)).widths).total_ms
    checkpoint = ["--policy", run.root.parent / "checkpoint"]
    limit = ["--max-predicted-ms", 0.98 * before]
    limited = qvla(*arguments, *limit, *checkpoint, "--method", "hull")
    assert limited.code == 0, limited.err
    assert "an action: predicted" in limited.out
    after = model.predict(BitPlan.load(run.plan(setting)).widths).total_ms
    assert after <= 0.98 * before
    slow = qvla(*arguments, *limit, *checkpoint, "--power-mode", "15W")
    assert slow.code == 0 and "in mode 15W" in slow.out
    in_15w = replace(model, mode=ORIN_JP7.power_mode("15W"))
    assert in_15w.predict(BitPlan.load(run.plan(setting)).widths).total_ms <= 0.98 * before
    never = qvla(*arguments, "--max-predicted-ms", 0.001, *checkpoint)
    assert "cannot be met: the least" in never.error
    assert "needs --policy" in qvla(*arguments, *limit).error
    fixed = [*arguments[:4], "w8-rtn", *arguments[5:]]
    assert "fixed widths" in qvla(*fixed, *limit, *checkpoint).error
    assert "qvla bench rates" in qvla(*arguments[:5], *limit, *checkpoint).error


def test_sensitivities_of_other_scales_are_refused(run: RunFolder) -> None:
    """Measured with blocks of 128 inputs, as Orin has them; a CPU has 64."""
    arguments = ["plan", "--run", run.root, "--setting"]
    refused = qvla(*arguments, "w8", "--target", "cpu")
    assert "scale groups of sensitivities and target" in refused.error
    assert "qvla sensitivities --target cpu" in refused.error
    assert not run.plan(parse_setting("w8")).exists()
    # The baseline has scales of its own; the other TensorRT targets have the same blocks.
    assert qvla(*arguments, "w8-rtn", "--target", "cpu").code == 0
    assert qvla(*arguments, "w8", "--target", "rtx4070").code == 0


@pytest.mark.parametrize(("ms", "shown"), [(0.0042, "0.0042"), (0.437, "0.437"), (839.41, "839")])
def test_small_predictions_keep_their_digits(ms: float, shown: str) -> None:
    line = str(
        PredictedAction(
            "MAXN", "plan", "dequantized", 1e6, 1.0, ms, ms / 2, ms * 2, {"decoder": ms}
        )
    )
    assert f"predicted {shown} ms [" in line and line.endswith(f"decoder {shown}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of the two"),
        (("--geometry", "openvla-7b", "--bits", "3"), "add up to 1"),
        (("--geometry", "openvla-7b", "--bits", "8:0.5,4:0.4"), "add up to 1"),
        (("--geometry", "openvla-7b", "--target", "cpu"), "qvla bench rates"),
        (("--geometry", "openvla-7b", "--power-mode", "60W"), "no power mode '60W'"),
        (("--geometry", "openvla-7b", "--rates", "nowhere.json"), "not found"),
    ],
)
def test_the_command_refuses(arguments: tuple[str, ...], message: str) -> None:
    assert message in qvla("predict", *arguments).error

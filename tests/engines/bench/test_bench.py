"""`qvla bench engines`: every engine computes the stack; bytes and products are right."""

import json
import time
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from engines.bench import contenders
from engines.bench.contender import Contender
from engines.bench.contenders import BASELINE, DYNAMIC
from engines.bench.decoder import DecoderGeometry, DecoderStack, measure_ranges
from engines.bench.mixes import MIXES, W4_UNPRUNED
from engines.bench.modelopt import ModeloptEnvironment
from engines.bench.openvino_contenders import (
    FLOAT,
    INT4,
    INT8,
    INT8_FLOAT_ATTENTION,
    OpenVinoBench,
)
from engines.bench.pairs import compare_pairs
from engines.bench.peaks import measure_peaks
from engines.bench.torchao_contender import TORCHAO, TORCHAO_INT4
from engines.rounds import speedup, time_in_turn
from engines.targets import CPU
from qvla_export.cli.app import app
from qvla_export.shared.errors import QvlaError

GEOMETRY = DecoderGeometry(width=128, mlp=352, depth=1, heads=2, tokens=5)
WEIGHTS = 4 * 128 * 128 + 3 * 128 * 352


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return DecoderStack(GEOMETRY)


@pytest.fixture(scope="module")
def found(stack: DecoderStack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Contender]:
    folder = tmp_path_factory.mktemp("graphs")
    return {c.name: c for c in contenders.prepare(stack, folder, threads=1, modelopt=None)}


def test_all_contenders_are_there_and_take_one_row_or_many(
    stack: DecoderStack, found: dict[str, Contender]
) -> None:
    own = {BASELINE, "torch eager FP32", DYNAMIC, *(mix.name for mix in MIXES)}
    if OpenVinoBench.is_installed():
        own |= {f"{mix.name} (OpenVINO)" for mix in MIXES if mix.rounds_inputs} | {FLOAT}
    # NNCF is in the baselines' environment only, torchao in none of ours.
    assert set(found) - {INT8, INT8_FLOAT_ATTENTION, INT4, TORCHAO, TORCHAO_INT4} == own
    for contender in found.values():
        for tokens in (1, 5):
            output = contender.run(stack.example(tokens))
            assert output.shape == (1, tokens, 128) and np.isfinite(output).all()


def test_engines_that_prune_nothing_are_near_the_float_network(
    stack: DecoderStack, found: dict[str, Contender]
) -> None:
    x = stack.example(5, seed=3)
    reference = found["torch eager FP32"].run(x)
    tolerance = {BASELINE: 1e-5, DYNAMIC: 0.05, "ours w8a8": 0.05, "ours w4, nothing pruned": 0.5}
    for name, share in tolerance.items():
        error = np.linalg.norm(found[name].run(x) - reference) / np.linalg.norm(reference)
        assert error < share, name


def test_the_same_plan_means_the_same_whatever_the_runtime_does_with_it(
    stack: DecoderStack, found: dict[str, Contender]
) -> None:
    x = stack.example(5, seed=3)
    exact = found["ours w4, exact activations"].run(x)
    scale = np.abs(exact).max()
    assert np.abs(found["ours w4, unpacked"].run(x) - exact).max() < 1e-4 * scale
    rounded = np.abs(found["ours w4"].run(x) - exact).max()
    assert 0 < rounded < 0.1 * scale


def test_pruning_removes_multiplications_and_plans_bytes(found: dict[str, Contender]) -> None:
    for name in (BASELINE, DYNAMIC, "ours w8a8"):
        assert found[name].multiplications == WEIGHTS
    # Its few 2-bit channels are filled up to fours.
    assert WEIGHTS <= found["ours w4, nothing pruned"].multiplications < 1.01 * WEIGHTS
    rounded = [found[f"ours {bits}, 30 % pruned"] for bits in ("w8a8", "w4a8", "w3a8", "w2a8")]
    # Filling 2-bit columns up to fours adds a few.
    assert all(c.multiplications < 0.71 * WEIGHTS for c in rounded)
    assert sorted(rounded, key=lambda c: -c.stored_bytes) == rounded
    assert found["ours w3"].multiplications < found["ours w4"].multiplications < 0.75 * WEIGHTS
    assert found["ours w3"].stored_bytes < found["ours w4"].stored_bytes
    assert found["ours w4"].stored_bytes < found["ours w8a8"].stored_bytes
    assert found[BASELINE].stored_bytes > 4 * WEIGHTS


def test_mixes_have_the_mean_bits_of_their_names(stack: DecoderStack) -> None:
    ranges = measure_ranges(stack, stack.example(5))
    means = {m.name: m.plan(stack.shapes, CPU, ranges).mean_bits_per_channel for m in MIXES}
    for name, bits in means.items():
        wanted = float(name.removeprefix("ours w")[0])
        if name not in ("ours w3", "ours w8a8, 30 % pruned"):
            assert abs(bits - wanted) < 0.1, name
    assert 0 not in W4_UNPRUNED


def test_layers_of_one_input_share_a_range(stack: DecoderStack) -> None:
    ranges = measure_ranges(stack, stack.example(5)).ranges
    block = "language_model.model.layers.0.self_attn"
    assert len({ranges[f"{block}.{name}"] for name in ("q_proj", "k_proj", "v_proj")}) == 1


def test_rounds_go_in_turn_and_the_first_is_dropped() -> None:
    order: list[str] = []
    samples = time_in_turn({n: lambda n=n: order.append(n) for n in "abc"}, rounds=3)  # type: ignore[misc]
    assert "".join(order) == "abc" * 4
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 3)


@given(st.lists(st.floats(0.1, 1e3), min_size=2, max_size=30), st.floats(0.1, 10))
def test_a_speedup_lies_in_its_interval_and_scales(times: list[float], factor: float) -> None:
    baseline = np.array(times)
    ratio = speedup(baseline / factor, baseline)
    assert ratio.median == pytest.approx(factor)
    assert ratio.low <= ratio.median * (1 + 1e-9) and ratio.median <= ratio.high * (1 + 1e-9)
    assert speedup(baseline, baseline).low == speedup(baseline, baseline).high == 1.0


def test_the_command_writes_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    done = CliRunner().invoke(
        app,
        [
            *("bench", "engines", "--quick", "--rounds", "2", "--clock", "cpu", "--layers", "1"),
            *("--output", str(path)),
        ],
    )
    assert done.exit_code == 0, done.output
    value = json.loads(path.read_text())
    assert value["threads"] == 1 and value["clock"] == "cpu" and value["cpu"]
    assert value["versions"]["onnxruntime"]
    for name in ("openvino", "nncf", "torchao"):
        assert (name in value["versions"]) == (find_spec(name) is not None)
    assert [regime["regime"] for regime in value["regimes"]] == ["pass", "decode"]
    assert {regime["depth"] for regime in value["regimes"]} == {1}
    on_openvino = set()
    if find_spec("openvino") is not None:
        on_openvino = {FLOAT, *(f"{mix.name} (OpenVINO)" for mix in MIXES if mix.rounds_inputs)}
        if find_spec("nncf") is not None:
            on_openvino |= {INT8, INT8_FLOAT_ATTENTION, INT4}
    for regime in value["regimes"]:
        names = [row["name"] for row in regime["engines"]]
        own = [name for name in names if not name.startswith("torchao")]
        assert names[0] == BASELINE and len(own) == 3 + len(MIXES) + len(on_openvino)
        assert on_openvino <= set(names)
        assert all(len(row["samples_ms"]) == 2 for row in regime["engines"])
        assert all(row["name"] in done.output for row in regime["engines"])


def test_the_clock_of_one_thread_is_for_one_thread(tmp_path: Path) -> None:
    words = ["bench", "engines", "--quick", "--clock", "cpu", "--threads", "2"]
    refused = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "bench.json")])
    assert refused.exit_code != 0 and "--clock cpu adds up" in str(refused.exception)
    spent = time_in_turn({"asleep": lambda: time.sleep(0.05)}, rounds=2, clock="cpu")
    assert max(spent["asleep"]) < 50


def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("no folder")
    with pytest.raises(QvlaError, match="without --modelopt"):
        ModeloptEnvironment(taken / "inside").create()


def test_what_was_not_timed_is_compared_with_nothing() -> None:
    base = np.array([10.0, 11.0, 12.0])
    samples = {
        "ours w4a8, 30 % pruned": base,
        "ours w8a8, 30 % pruned": 2 * base,
        "ours w3": base / 2,
        INT4: base,
    }
    (one,) = compare_pairs(samples, tokens=300)
    assert (one.name, one.against) == ("ours w4a8, 30 % pruned", "ours w8a8, 30 % pruned")
    assert one.ratio.median == pytest.approx(2)
    decoded = {(p.name, p.against): p.ratio.median for p in compare_pairs(samples, tokens=1)}
    assert decoded["ours w3", INT4] == pytest.approx(2) and len(decoded) == 3


def test_peaks_are_taken_by_the_clock_of_the_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes a millisecond of the CPU's clock here."""
    monkeypatch.setattr("engines.rounds.time.process_time_ns", count(0, 10**6).__next__)
    peaks = measure_peaks(threads=1, size=64, buffer_bytes=1 << 20, clock="cpu")
    assert peaks.int8_gops == peaks.float32_gflops == pytest.approx(2 * 64**3 / 1e6)
    assert peaks.bandwidth_gb_s == pytest.approx((1 << 20) / 1e6)

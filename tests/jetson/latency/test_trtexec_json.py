"""Files in trtexec's layout: its keys, its arithmetic, and the readers NVIDIA ships beside it.

The keys and what the readers do with them are facts of NVIDIA/TensorRT, samples/common/
sampleReporting.cpp and samples/trtexec/{tracer,profiler,prn_utils}.py; the code here is ours.
"""

import json
from typing import Any

import numpy as np
import pytest

from engines.layer_times import LayerTime, LayerTimes
from jetson.board import read_board_state
from jetson.latency.profile import LatencyProfile
from jetson.latency.trtexec_json import profile_json, times_json
from qvla_export.shared.errors import QvlaError

BOARD = read_board_state()
# What `exportJSONTrace` of TensorRT 10 writes, in order.
KEYS = [
    *("startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs"),
    *("startD2hMs", "endD2hMs", "h2dMs", "computeMs", "d2hMs", "latencyMs"),
]
# What tracer.py prints; it has not followed trtexec's renaming and leaves the rest blank.
TRACER = [
    *("startInMs", "endInMs", "startComputeMs", "endComputeMs", "startOutMs", "endOutMs"),
    *("inMs", "computeMs", "outMs", "latencyMs", "endToEndMs"),
]


def profile(stages: dict[str, list[float]], transport: str = "in-process") -> LatencyProfile:
    samples = {stage: np.array(values) for stage, values in stages.items()}
    return LatencyProfile(
        name="w4", samples_ms=samples, started_ms=np.array([0.0, 100.0]), warmup=1,
        first_action_ms=9.0, load_ms=None, transport=transport, bundle_digest="d", target="cpu",
        horizon=8, versions={}, board_before=BOARD, board_after=BOARD,
    )  # fmt: skip


ON_GPU = {
    "decode": [1.0, 2.0],
    "preprocess": [3.0, 3.0],
    "engine": [20.0, 21.0],
    "engine.host_to_device": [0.5, 0.5],
    "engine.vision": [5.0, 5.0],
    "engine.decoder": [10.0, 11.0],
    "engine.device_to_host": [0.25, 0.25],
    "total": [30.0, 30.0],
}


def read_trace(rows: Any, start: float = 0.0) -> list[list[Any]]:
    """Do as tracer.py: drop what computes before `start`, then its columns, blank if absent."""
    kept = next((rows[i:] for i, row in enumerate(rows) if row["startComputeMs"] >= start), [])
    return [[row.get(name, "") for name in TRACER] for row in kept]


def read_layers(layers: Any) -> tuple[int, dict[str, float]]:
    """Do as profiler.py: the count first, then layers found by name with four fields."""
    fields = ("name", "timeMs", "averageMs", "percentage")
    rows = [[row[name] for name in fields] for row in layers[1:]]
    return layers[0]["count"], {name: average for name, _, average, _ in rows}


def test_times_have_trtexecs_keys_and_arithmetic() -> None:
    rows = json.loads(json.dumps(times_json(profile(ON_GPU))))
    assert [list(row) for row in rows] == [KEYS, KEYS]
    assert rows[1]["startEnqMs"] == 100 + 2 + 3 and rows[1]["endEnqMs"] == 126
    for row in rows:
        for name in ("H2d", "Compute", "D2h"):
            length = row[f"end{name}Ms"] - row[f"start{name}Ms"]
            assert length == pytest.approx(row[f"{name[0].lower()}{name[1:]}Ms"])
        assert row["startH2dMs"] <= row["startComputeMs"] <= row["startD2hMs"]
        assert row["latencyMs"] == row["h2dMs"] + row["computeMs"] + row["d2hMs"]
    assert [row["computeMs"] for row in rows] == [15.0, 16.0]


def test_a_cpu_copies_nothing() -> None:
    on_cpu = {s: v for s, v in ON_GPU.items() if "host" not in s}
    row = times_json(profile(on_cpu))[0]
    assert (row["h2dMs"], row["d2hMs"], row["latencyMs"]) == (0.0, 0.0, 15.0)
    assert row["startH2dMs"] == row["endH2dMs"] == row["startComputeMs"]
    whole = {s: v for s, v in ON_GPU.items() if not s.startswith("engine.")}
    assert times_json(profile(whole))[0]["computeMs"] == 20.0


def test_nvidias_tracer_reads_them() -> None:
    rows = times_json(profile(ON_GPU))
    assert len(read_trace(rows)) == 2
    (late,) = read_trace(rows, start=50.0)
    assert late[TRACER.index("computeMs")] == 16.0 and late[TRACER.index("latencyMs")] == 16.75


def test_a_server_has_no_engine_to_trace() -> None:
    with pytest.raises(QvlaError, match="in this process"):
        times_json(profile(ON_GPU, transport="http"))
    with pytest.raises(QvlaError, match=r"spans \['total'\]"):
        times_json(profile({"total": [1.0, 2.0]}))


def row(stage: str, name: str, *ms: float) -> LayerTime:
    return LayerTime(stage, name, "MatMul", "", None, np.array(ms))


def test_nvidias_profiler_reads_layers() -> None:
    times = LayerTimes("r", (row("policy", "a", 1.0, 2.0, 6.0), row("policy", "b", 1.0, 1.0, 1.0)))
    layers = json.loads(json.dumps(profile_json(times)))
    assert layers[0] == {"count": 3}
    assert list(layers[1]) == ["name", "timeMs", "averageMs", "medianMs", "percentage"]
    assert list(layers[1].values()) == ["a", 9.0, 3.0, 2.0, 75.0]
    assert read_layers(layers) == (3, {"a": 3.0, "b": 1.0})


def test_layers_have_names_of_their_own() -> None:
    times = LayerTimes("r", tuple(row(s, n, 1.0) for s, n in [("v", "x"), ("v", "x"), ("d", "x")]))
    names = [layer["name"] for layer in profile_json(times)[1:]]
    assert names == ["v: x", "v: x (2)", "d: x"]
    idle = profile_json(LayerTimes("r", (row("v", "x", 0.0),)))
    assert idle[1]["percentage"] == 0.0

"""OpenVINO behind the same `Engine`: float graphs, expanded codes, programs that repeat."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from form_bundles import packed_bundle, rounded_bundle
from loop_bundles import ROWS, loop_bundle
from tiny_bundles import make_bundle

from engines.base import EngineError, InvalidFeeds
from engines.load import load_engine
from engines.ort import cpu_description, saturates
from engines.verify import judge, run_engine
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import WeightForm

Observations = Callable[..., list[Observation]]

pytest.importorskip("openvino", reason="not installed: pip install 'qvla[openvino]'")


def test_a_float_bundle_acts_as_torch_does(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    bundle = make_bundle(tiny_policy, None, tiny_observations(2), tmp_path / "b")
    feeds = bundle.golden().feeds[0]
    with load_engine(bundle, 1, runtime="openvino") as engine:
        assert judge(bundle, engine).passed
        assert engine.runtime.startswith("openvino ")
        times = engine.layer_times(feeds, passes=2)
        with pytest.raises(InvalidFeeds, match="missing"):
            engine.infer({})
    assert times.total_ms > 0 and times.passes == 2
    assert any(row.layer for row in times.rows)
    with pytest.raises(EngineError, match="closed"):
        engine.infer(feeds)
    with pytest.raises(EngineError, match="at least 1"):
        load_engine(bundle, 0, runtime="openvino")


def test_expanded_codes_run_and_packed_ones_are_refused_by_name(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    seen = tiny_observations(2)
    rounded = rounded_bundle(tiny_policy, seen, tmp_path / "rounded")
    feeds = rounded.golden().feeds
    with load_engine(rounded, 1) as engine:
        expected = run_engine(engine, feeds)
    # Here products of integers overflow in OpenVINO, or they do not.
    forms: tuple[WeightForm, ...] = ("unpacked", "packed")
    if saturates(cpu_description()):
        with pytest.raises(EngineError, match=r"overflow on this CPU.*--runtime ort"):
            load_engine(rounded, 1, runtime="openvino")
        forms = ("unpacked",)
    for weights in forms:
        with load_engine(rounded, 1, weights, "openvino") as engine:
            # Rounded activations that lie on a tie fall to either side.
            assert np.abs(run_engine(engine, feeds) - expected).mean() <= 5e-2
    packed = packed_bundle(tiny_policy, seen, tmp_path / "packed")
    with pytest.raises(EngineError, match=r"2 or 4 bits.*w4a8 with --scales two-level"):
        load_engine(packed, 1, runtime="openvino")
    with load_engine(packed, 1, "unpacked", "openvino") as engine:
        assert judge(packed, engine).passed


@pytest.mark.parametrize("keep_loaded", [True, False])
def test_what_is_carried_comes_back_in(
    keep_loaded: bool, tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    bundle = loop_bundle(tiny_policy, tiny_observations(2), tmp_path / "b")
    with load_engine(bundle, 1, runtime="openvino", keep_loaded=keep_loaded) as engine:
        for _ in range(2):
            assert judge(bundle, engine).drift.worst == 0
        assert engine.part_calls == {"start": 1, "count": ROWS}


def test_other_targets_are_refused(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    bundle = loop_bundle(tiny_policy, tiny_observations(1), tmp_path / "b", "cuda")
    with pytest.raises(EngineError, match="target cpu"):
        load_engine(bundle, runtime="openvino")


@pytest.mark.parametrize(("first", "axis"), [((2, 0, 1), 0), ((1, 0, 2), 0), ((2, 0, 1), 1)])
def test_channels_are_put_in_order_by_one_gather(
    first: tuple[int, int, int], axis: int, tmp_path: Path
) -> None:
    import openvino

    from engines.openvino_graph import read_graph

    hidden = ir.val("hidden", ir.DataType.FLOAT, (4, 3, 5))
    order = ir.tensor(np.array([2, 0, 2, 1], np.int32), name="order")
    tape = ir.tape.Tape()
    turned = tape.op("Transpose", [hidden], {"perm": list(first)})
    picked = tape.op("Gather", [turned, tape.initializer(order)], {"axis": axis})
    output = tape.op("Transpose", [picked], {"perm": [1, 2, 0]})
    output.name, output.type = "output", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [hidden],
        [output],
        nodes=tape.nodes,
        initializers=list(tape.initializers),
        opset_imports={"": 21},
    )
    path = tmp_path / "graph.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    model = read_graph(openvino.Core(), path)
    x = np.random.default_rng(1).standard_normal((4, 3, 5)).astype(np.float32)
    found = openvino.compile_model(model, "CPU")({"hidden": x})["output"]
    expected = np.take(x.transpose(first), [2, 0, 2, 1], axis).transpose(1, 2, 0)
    np.testing.assert_array_equal(found, expected)
    left = sum(node.get_type_name() == "Transpose" for node in model.get_ordered_ops())
    # What transposes otherwise stays as it is.
    assert left == (0 if first == (2, 0, 1) and axis == 0 else 2)

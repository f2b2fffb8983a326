"""Times of layers: names from the graph to the runtime's report, passes, groups, hostile files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundles import make_bundle, mixed_plan

from engines.base import EngineError
from engines.layer_times import LayerTime, LayerTimes
from engines.ort import OrtEngine
from engines.ort_layers import read_profile
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.plan import BitPlan
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.node_names import node_name, parse_constant_name, parse_node_name

layer_names = st.from_regex(r"[a-z][a-z0-9_]*(\.[a-z0-9_+]+){0,5}", fullmatch=True)


@pytest.fixture(scope="module")
def bundle(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    path = tmp_path_factory.mktemp("layers") / "bundle"
    return make_bundle(tiny_policy, mixed_plan(tiny_policy), tiny_observations(2), path)


@pytest.fixture(scope="module")
def times(bundle: Bundle) -> LayerTimes:
    with OrtEngine(bundle, threads=1) as engine:
        before = engine.infer(bundle.golden().feeds[0])["actions"]
        found = engine.layer_times(bundle.golden().feeds[0], passes=4)
        # The profiler's sessions are others than those that act.
        np.testing.assert_array_equal(engine.infer(bundle.golden().feeds[0])["actions"], before)
    return found


@given(layer_names, st.sampled_from([None, 2, 4, 8, 16]), st.sampled_from(["MatMul", "Gather"]))
def test_names_say_layer_and_width_also_when_the_runtime_adds(
    layer: str, bits: int | None, op_type: str
) -> None:
    name = node_name(layer, bits, op_type)
    for added in ("", "_2", "/MatMulAddFusion", "/MatMulScaleFusion/"):
        found = parse_node_name(name + added)
        assert found is not None and (found.layer, found.bits) == (layer, bits)


@pytest.mark.parametrize(
    "name",
    ["", "node_MatMul_4", "Transpose", "/model/MatMul", "node_slice_5/GatherSliceToSplitFusion"],
)
def test_other_names_say_no_layer(name: str) -> None:
    assert parse_node_name(name) is None


def test_constants_tell_whose_they_are() -> None:
    assert parse_constant_name("vision.q+k.b4.codes") == ("vision.q+k", 4)
    assert parse_constant_name("module.head.fc1.weight.transposed.stored") == ("head.fc1", None)
    assert parse_constant_name("mlp.fc2.order") == ("mlp.fc2", None)
    assert parse_constant_name("val_12") is None


def test_a_graph_names_its_nodes_after_the_planned_layers(bundle: Bundle) -> None:
    planned = set(BitPlan.load(bundle.path / "plan.json").widths)
    graph = ir.load(bundle.model_path(bundle.parts[0])).graph
    names = [node.name for node in graph]
    assert len({*names}) == len(names)
    products = [parse_node_name(str(n.name)) for n in graph if n.op_type in ("MatMul", "Gemm")]
    layers = {found.layer for found in products if found is not None and found.bits is not None}
    members = {
        f"{layer.rsplit('.', 1)[0]}.{member}" if "+" in layer else layer
        for layer in layers
        for member in layer.rsplit(".", 1)[-1].split("+")
    }
    # Members of merged layers are named by their last part, from where they differ.
    assert len(layers & planned) > 5 and len(members) >= 0.9 * len(planned)
    assert {found.bits for found in products if found} >= {2, 4, 8, 16}


def test_onnx_runtime_reports_every_width(times: LayerTimes) -> None:
    assert times.passes == 4 and times.runtime.startswith("onnxruntime ")
    assert {row.part for row in times.rows} == {"policy"}
    widths = {share.name: share for share in times.by_width()}
    assert {"2 bits", "4 bits", "8 bits", "16 bits", "no layer"} <= set(widths)
    packed = [row for row in times.rows if row.op_type == "MatMulNBits"]
    assert packed and all(row.bits in (2, 4, 8) and row.layer for row in packed)
    assert sum(share.nodes for share in times.by_op_type()) == len(times.rows)
    assert times.total_ms > 0


def test_layer_times_survive_their_file(times: LayerTimes) -> None:
    again = LayerTimes.from_json(json.loads(json.dumps(times.to_json())))
    assert again.to_json() == times.to_json() and again.by_layer() == times.by_layer()


def test_groups_are_sums_of_medians_and_add_up() -> None:
    rows = [("a", 4, [1.0, 9.0]), ("a", 2, [3.0, 1.0]), ("", None, [4.0, 0.0])]
    named = [
        LayerTime("s", f"n{i}", "MatMul", name, bits, np.array(ms))
        for i, (name, bits, ms) in enumerate(rows)
    ]
    times = LayerTimes("r", tuple(named))
    assert times.total_ms == 9.0
    assert sum(share.share for share in times.by_op_type()) == 1
    assert [(s.name, s.nodes, s.ms) for s in times.by_layer()] == [("a", 2, 7.0), ("n2", 1, 2.0)]


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(rows=[]),
        lambda v: v.update(rows=[1]),
        lambda v: v["rows"][0].pop("layer"),
        lambda v: v["rows"][0].update(bits="4"),
        lambda v: v["rows"][0].update(samples_ms=[1.0]),
        lambda v: v["rows"][0].update(samples_ms=["x"] * 4),
        lambda v: v["rows"][0].update(samples_ms=[-1.0] * 4),
        lambda v: v["rows"][0].update(samples_ms=[float("nan")] * 4),
        lambda v: [row.update(samples_ms=[]) for row in v["rows"]],
        lambda v: [row.update(samples_ms=2.0) for row in v["rows"]],
    ],
)
def test_damaged_layer_times_are_refused(times: LayerTimes, change: Any) -> None:
    value = json.loads(json.dumps(times.to_json()))
    change(value)
    with pytest.raises(ArtifactError):
        LayerTimes.from_json(value)


def event(name: str, index: int, us: float) -> dict[str, Any]:
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "dur": us,
        "args": {"op_name": "MatMul", "node_index": str(index)},
    }


def test_nodes_of_one_name_are_told_apart_and_the_first_runs_dropped(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    runs = [[event("Transpose", 1, us), event("Transpose", 2, 10 * us)] for us in (900, 5, 7)]
    path.write_text(json.dumps([{"cat": "Session"}, *(e for run in runs for e in run)]))
    first, second = read_profile(path, "policy", 3, 1)
    assert first.samples_ms.tolist() == [0.005, 0.007]
    assert second.samples_ms.tolist() == [0.05, 0.07]


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "[1]", '[{"cat": "Node"}]', json.dumps([event("a", 1, 2)]), "[" * 100_000],
)
def test_a_profile_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(EngineError, match=r"part 'policy'.*(fewer passes|cannot be read)"):
        read_profile(path, "policy", 2, 1)

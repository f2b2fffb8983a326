"""Layers' weights in float32 or as stored: the same numbers, chosen when a graph is loaded."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from form_bundles import packed_bundle, rounded_bundle
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from ort_graphs import LAYER, linear_model

from engines.base import EngineError
from engines.forms.candidates import LayerForms, choose_layers
from engines.forms.float_layers import all_layers, layers_of, with_float_layers
from engines.forms.folded import resident_bytes
from engines.forms.graph_file import GraphFile
from engines.ort import OrtEngine, ort_options
from engines.targets import CPU
from engines.verify import run_engine
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.name_nodes import name_nodes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.quantize import fake_quantize, spec_for
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import Target

Observations = Callable[..., list[Observation]]


@pytest.fixture(scope="module")
def packed(
    tiny_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    return packed_bundle(tiny_policy, tiny_observations(2), tmp_path_factory.mktemp("p") / "b")


@pytest.fixture(scope="module")
def rounded(
    tiny_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    return rounded_bundle(tiny_policy, tiny_observations(2), tmp_path_factory.mktemp("r") / "b")


def layer_graph(
    target: Target, inputs: int
) -> tuple[ir.Model, NDArray[np.float32], NDArray[np.float32]]:
    """Return a layer of every width as a graph, and rows with what they become."""
    generator = np.random.default_rng(inputs)
    widths = np.repeat([8, 4, 2, 16, 0], 8).astype(np.int8)
    weight = generator.standard_normal((len(widths), inputs)).astype(np.float32)
    spec = spec_for(target)
    model = bucketize(linear_model(weight, None), {LAYER: widths}, spec, target)
    name_nodes(model)
    rows = generator.standard_normal((1, 3, inputs)).astype(np.float32)
    return model, rows, rows @ fake_quantize(weight, widths, spec).T


def policy_graph(bundle: Bundle) -> Path:
    return bundle.model_path(bundle.parts[0])


def test_a_file_that_nothing_was_changed_in_says_the_same(packed: Bundle) -> None:
    path = policy_graph(packed)
    again = onnx.load_from_string(GraphFile.read(path).to_bytes())
    assert again == onnx.load(path, load_external_data=False)


def test_constants_are_counted_as_onnx_counts_them(packed: Bundle) -> None:
    stored = onnx.load(policy_graph(packed), load_external_data=False).graph.initializer
    found = GraphFile.read(policy_graph(packed)).constants
    assert {t.name: (t.data_type, tuple(t.dims)) for t in stored} == {
        name: (constant.dtype, constant.shape) for name, constant in found.items()
    }
    assert sum(c.nbytes for c in found.values()) == sum(packed.weight_bytes.values())


@pytest.fixture(scope="module")
def small_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of one layer, constants inside."""
    path = tmp_path_factory.mktemp("small") / "graph.onnx"
    ir.save(layer_graph(CPU, 64)[0], path)
    return path


@given(st.data())
def test_damaged_files_are_refused_or_read(small_graph: Path, data: st.DataObject) -> None:
    whole = bytearray(small_graph.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = small_graph.with_name("damaged.onnx")
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        graph = GraphFile.read(path)
        with_float_layers(graph, layers_of(graph)).to_bytes()
    except EngineError as error:
        assert "copy the bundle again" in str(error)


@pytest.mark.parametrize("bundle", ["packed", "rounded"])
def test_layers_in_float_act_as_stored_ones(
    bundle: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    found: Bundle = request.getfixturevalue(bundle)
    every = all_layers(found)
    half = {part: frozenset(sorted(layers)[::2]) for part, layers in every.items()}
    assert sum(map(len, half.values())) > 8
    feeds = found.golden().feeds
    actions, nbytes = [], []
    for float_layers in ({}, half, every):
        with OrtEngine(found, threads=1, float_layers=float_layers) as engine:
            actions.append(run_engine(engine, feeds))
        nbytes.append(resident_bytes(found, float_layers).total)
    # Sums of rounded inputs in another order fall to the other side of a tie now and then.
    limit = 1e-5 if bundle == "packed" else 2e-2
    for other in actions[1:]:
        assert np.abs(other - actions[0]).max() <= limit
    assert nbytes[0] < nbytes[1] < nbytes[2]


def test_what_a_layer_holds_is_known_in_both_forms(packed: Bundle) -> None:
    every = all_layers(packed)
    stored, whole = resident_bytes(packed, {}), resident_bytes(packed, every)
    keys = {(part, layer) for part, layers in every.items() for layer in layers}
    assert keys <= set(stored.layers) and keys <= set(whole.layers)
    added = sum(whole.layers[key] - stored.layers[key] for key in keys)
    assert added == whole.total - stored.total


@pytest.mark.parametrize("target", [CPU, CPU.with_zero_points(), CPU.with_two_level_scales()])
@pytest.mark.parametrize("inputs", [64, 150])
def test_float_weights_are_those_of_the_codes(target: Target, inputs: int, tmp_path: Path) -> None:
    model, rows, expected = layer_graph(target, inputs)
    ir.save(model, tmp_path / "m.onnx")
    graph = GraphFile.read(tmp_path / "m.onnx")
    assert layers_of(graph) == (LAYER,)
    options = ort_options(0, 1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(
        with_float_layers(graph, [LAYER]).to_bytes(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {session.get_inputs()[0].name: rows})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    kinds = {node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph}
    assert not kinds & {"MatMulNBits", "DequantizeLinear"}


@given(
    st.lists(
        st.tuples(st.floats(0, 9), st.floats(0, 9), st.integers(0, 99), st.integers(0, 400)),
        max_size=12,
    ),
    st.integers(0, 2000),
)
def test_layers_are_chosen_that_gain_and_fit(
    drawn: list[tuple[float, float, int, int]], room: int
) -> None:
    layers = [LayerForms("p", str(i), *values) for i, values in enumerate(drawn)]
    chosen = choose_layers(layers, room).get("p", ())
    taken = [layer for layer in layers if layer.layer in chosen]
    assert all(layer.saved_ms > 0 for layer in taken)
    left = room - sum(layer.added_bytes for layer in taken)
    assert left >= 0
    # Whatever gains and still fits is among them.
    assert not [
        layer
        for layer in layers
        if layer.layer not in chosen and layer.saved_ms > 0 and layer.added_bytes <= left
    ]


def test_the_best_for_a_byte_comes_first() -> None:
    layers = [LayerForms("p", "a", 3, 1, 0, 100), LayerForms("p", "b", 2, 1, 0, 10)]
    assert choose_layers(layers, 105) == {"p": {"b"}}
    assert choose_layers(layers, 110) == {"p": {"a", "b"}}

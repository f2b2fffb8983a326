"""MLPs without their constant units compute what the fake-quantized MLPs compute."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from ort_graphs import constant, model_of, run_model
from scipy.special import erf

from engines.targets import CPU
from qvla_export.graph.float_graph import LAYER_KEY, ExportError, layer_nodes, weight_rows
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.couple import couple_mlps
from qvla_export.quantizer.coupling import Coupling, fake_quantize_coupled, find_couplings
from qvla_export.quantizer.quantize import fake_quantize, spec_for

SPEC = spec_for(CPU)
INPUTS, UNITS, OUTPUTS = 48, 150, 20
PLAIN, GATED = ("mlp.fc1", "mlp.fc2"), ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MIXTURE = (0, 2, 4, 8, 16)


def random(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = random(6, 2, 3, INPUTS)


def weights(names: tuple[str, ...]) -> dict[str, NDArray[np.float32]]:
    shapes = [(UNITS, INPUTS)] * (len(names) - 1) + [(OUTPUTS, UNITS)]
    return {
        name: random(i, *shape) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }


class Mlp:
    """Records an MLP; parts of it can be left out or replaced."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.tape = ir.tape.Tape()
        self.weights = weights(names)
        self.x = ir.val("x", ir.DataType.FLOAT, ("B", "M", INPUTS))

    def layer(self, name: str, x: ir.Value, bias: bool) -> ir.Value:
        metadata = {LAYER_KEY: name}
        matrix = constant(self.tape, name, self.weights[name].T)
        y = self.tape.op("MatMul", [x, matrix], metadata_props=metadata)
        if not bias:
            return y
        offset = random(9, len(self.weights[name]))
        return self.tape.op("Add", [y, constant(self.tape, f"{name}.bias", offset)])

    def model(self, output: ir.Value) -> ir.Model:
        return model_of(self.tape, self.x, output)


def plain_model(output_bias: bool = True, activation: str = "Gelu", **attributes: Any) -> ir.Model:
    mlp = Mlp(PLAIN)
    hidden = mlp.tape.op(activation, [mlp.layer("mlp.fc1", mlp.x, True)], attributes)
    return mlp.model(mlp.layer("mlp.fc2", hidden, output_bias))


def gated_model(bias: bool = False) -> ir.Model:
    mlp = Mlp(GATED)
    gate, up = mlp.layer("mlp.gate_proj", mlp.x, bias), mlp.layer("mlp.up_proj", mlp.x, False)
    hidden = mlp.tape.op("Mul", [gate, mlp.tape.op("Sigmoid", [gate])])
    return mlp.model(mlp.layer("mlp.down_proj", mlp.tape.op("Mul", [hidden, up]), False))


def widths_of(names: tuple[str, ...], choices: tuple[int, ...]) -> dict[str, NDArray[np.int8]]:
    generator = np.random.default_rng(5)
    widths = {
        n: generator.choice(choices, len(w)).astype(np.int8) for n, w in weights(names).items()
    }
    widths[names[-1]] = generator.choice(MIXTURE, OUTPUTS).astype(np.int8)
    return widths


def coupling_of(widths: dict[str, NDArray[np.int8]]) -> Coupling:
    rows = weights(tuple(widths))
    (coupling,) = find_couplings(widths, {name: w.shape[1] for name, w in rows.items()})
    return coupling


def rounded(widths: dict[str, NDArray[np.int8]]) -> list[NDArray[np.float32]]:
    """Weights as `qvla_export.policies.layers.fake_quantized` sets them in torch."""
    rows = weights(tuple(widths))
    coupling = coupling_of(widths)
    last = fake_quantize_coupled(rows[coupling.consumer], widths[coupling.consumer], SPEC, coupling)
    return [fake_quantize(rows[n], widths[n], SPEC) for n in coupling.producers] + [last]


@pytest.mark.parametrize("choices", [MIXTURE, (0,), (2, 4), (0, 8)])
@pytest.mark.parametrize("output_bias", [True, False])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_plain_mlp(
    choices: tuple[int, ...], output_bias: bool, approximate: str, tmp_path: Path
) -> None:
    widths = widths_of(PLAIN, choices)
    first, second = rounded(widths)
    hidden = X @ first.T + random(9, UNITS)
    if approximate == "none":
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    else:
        hidden = torch.nn.functional.gelu(torch.from_numpy(hidden), approximate="tanh").numpy()
    expected = hidden @ second.T + (random(9, OUTPUTS) if output_bias else 0)
    model = plain_model(output_bias, approximate=approximate)
    coupled = couple_mlps(model, widths, [coupling_of(widths)], CPU.containers)
    got = run_model(bucketize(*coupled, SPEC, CPU), X, tmp_path)
    np.testing.assert_allclose(got, expected, atol=2e-3)


@pytest.mark.parametrize("choices", [MIXTURE, (0,), (2, 4), (0, 8)])
def test_gated_mlp(choices: tuple[int, ...], tmp_path: Path) -> None:
    widths = widths_of(GATED, choices)
    gate, up, down = rounded(widths)
    gated = X @ gate.T
    expected = (gated / (1 + np.exp(-gated)) * (X @ up.T)) @ down.T
    coupled = couple_mlps(gated_model(), widths, [coupling_of(widths)], CPU.containers)
    got = run_model(bucketize(*coupled, SPEC, CPU), X, tmp_path)
    np.testing.assert_allclose(got, expected, atol=2e-3 * np.sqrt(UNITS))


def test_constant_units_leave_producers_and_consumer() -> None:
    widths = widths_of(GATED, MIXTURE)
    before = gated_model()
    model, coupled = couple_mlps(before, widths, [coupling_of(widths)], CPU.containers)
    kept = int(((widths[GATED[0]] > 0) & (widths[GATED[1]] > 0)).sum())
    assert 0 < kept < UNITS
    nodes = layer_nodes(model)
    assert [weight_rows(nodes[n]).shape for n in GATED] == [
        (kept, INPUTS),
        (kept, INPUTS),
        (OUTPUTS, kept),
    ]
    assert (np.diff(coupled[GATED[0]]) <= 0).all()
    assert weight_rows(layer_nodes(before)[GATED[0]]).shape == (UNITS, INPUTS)


def test_order_follows_both_widths_and_is_stable() -> None:
    gate, up = np.array([4, 8, 0, 8, 4, 4], np.int8), np.array([4, 2, 8, 8, 4, 0], np.int8)
    widths = dict(zip(GATED, (gate, up, np.full(3, 4, np.int8)), strict=True))
    (coupling,) = find_couplings(widths, {GATED[0]: 9, GATED[1]: 9, GATED[2]: 6})
    assert coupling.order.tolist() == [3, 1, 0, 4]
    assert coupling.constant_units.tolist() == [2, 5]


def test_layers_of_other_sizes_or_names_are_not_coupled() -> None:
    widths = widths_of(PLAIN, (4,))
    assert find_couplings(widths, {PLAIN[0]: INPUTS, PLAIN[1]: UNITS + 1}) == ()
    assert find_couplings({PLAIN[1]: widths[PLAIN[1]]}, {PLAIN[1]: UNITS}) == ()
    assert find_couplings({"a.q_proj": widths[PLAIN[0]]}, {"a.q_proj": INPUTS}) == ()


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (plain_model(activation="Softmax"), PLAIN),
        (plain_model(approximate="other"), PLAIN),
        (gated_model(bias=True), GATED),
    ],
)
def test_what_cannot_be_followed_is_refused(model: ir.Model, names: tuple[str, ...]) -> None:
    widths = widths_of(names, MIXTURE)
    with pytest.raises(ExportError, match="the pass follows"):
        couple_mlps(model, widths, [coupling_of(widths)], CPU.containers)


def test_hidden_units_used_elsewhere_are_refused() -> None:
    model = plain_model()
    gelu = next(node for node in model.graph if node.op_type == "Gelu")
    model.graph.outputs.append(gelu.outputs[0])
    widths = widths_of(PLAIN, MIXTURE)
    with pytest.raises(ExportError, match="also used by the graph"):
        couple_mlps(model, widths, [coupling_of(widths)], CPU.containers)

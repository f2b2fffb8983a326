"""Parallel layers become one; the numbers stay."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from ort_graphs import constant, model_of, packed_matmuls, run_model
from tiny_bundles import float_graph, mixed_plan

from engines.targets import CPU, RTX4070
from qvla_export.graph.float_graph import LAYER_KEY, layer_nodes
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.merge import merge_parallel
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.quantize import fake_quantize, spec_for

SPEC = spec_for(CPU)
SIZES = {"block.q": 24, "block.k": 17, "block.v": 40}
INPUTS = 70


def random(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights() -> dict[str, NDArray[np.float32]]:
    return {name: random(seed, n, INPUTS) for seed, (name, n) in enumerate(SIZES.items())}


def parallel_model() -> ir.Model:
    """x -> MatMul and Add of each layer, side by side."""
    tape = ir.tape.Tape()
    x = ir.val("x", ir.DataType.FLOAT, ("B", "M", INPUTS))
    outputs = []
    for name, weight in weights().items():
        metadata = {LAYER_KEY: name}
        y = tape.op("MatMul", [x, constant(tape, name, weight.T)], metadata_props=metadata)
        outputs.append(tape.op("Add", [y, constant(tape, f"{name}.bias", random(9, len(weight)))]))
    return model_of(tape, x, tape.op("Concat", outputs, {"axis": -1}))


def random_widths(choices: tuple[int, ...]) -> dict[str, NDArray[np.int8]]:
    generator = np.random.default_rng(5)
    return {name: generator.choice(choices, n).astype(np.int8) for name, n in SIZES.items()}


@pytest.mark.parametrize("choices", [(0, 2, 4, 8, 16), (4,), (0,), (2, 8)])
def test_merged_layers_compute_the_same(choices: tuple[int, ...], tmp_path: Path) -> None:
    widths = random_widths(choices)
    x = random(6, 2, 3, INPUTS)
    model, merged = merge_parallel(parallel_model(), widths, RTX4070.containers)
    assert list(merged) == ["block.q+k+v"]
    got = run_model(bucketize(model, merged, SPEC, CPU), x, tmp_path)
    parts = [
        x @ fake_quantize(weight, widths[name], SPEC).T + random(9, len(weight))
        for name, weight in weights().items()
    ]
    np.testing.assert_allclose(got, np.concatenate(parts, axis=-1), atol=3e-4)


def test_one_matmul_for_each_width(tmp_path: Path) -> None:
    model = bucketize(
        *merge_parallel(parallel_model(), random_widths((0, 2, 4, 8, 16)), CPU.containers),
        SPEC,
        CPU,
    )
    run_model(model, random(6, 2, 3, INPUTS), tmp_path)
    assert [node.op_type for node in model.graph].count("MatMul") == 4
    packed = packed_matmuls(tmp_path / "model.onnx", tmp_path / "optimized.onnx")
    assert packed == {2: 1, 4: 1, 8: 1}


def test_layers_outside_the_plan_stay(tmp_path: Path) -> None:
    widths = random_widths((4, 8))
    del widths["block.k"]
    before = parallel_model()
    model, merged = merge_parallel(before, widths, RTX4070.containers)
    assert list(merged) == ["block.q+v"]
    assert set(layer_nodes(model)) == {"block.k", "block.q+v"}
    assert set(layer_nodes(before)) == set(SIZES)
    x = random(6, 2, 3, INPUTS)
    np.testing.assert_allclose(
        run_model(model, x, tmp_path), run_model(before, x, tmp_path), atol=1e-5
    )


def test_attention_and_gated_mlp_of_the_policy_are_merged(tiny_policy: OftPolicy) -> None:
    plan = mixed_plan(tiny_policy)
    model, merged = merge_parallel(float_graph(tiny_policy), plan.widths, CPU.containers)
    assert set(layer_nodes(model)) == set(merged)
    prefix = "language_model.model.layers.0."
    assert f"{prefix}self_attn.q_proj+k_proj+v_proj" in merged
    assert f"{prefix}mlp.gate_proj+up_proj" in merged
    assert not any(
        name.endswith(("q_proj", "k_proj", "up_proj")) for name in plan.widths if name in merged
    )
    assert sum(map(len, merged.values())) == sum(map(len, plan.widths.values()))


@pytest.mark.parametrize(
    ("choices", "apart"),
    [((8,), True), ((4,), True), ((2,), False), ((0,), False), ((4, 8), False)],
)
def test_layers_of_one_width_may_stay_apart(choices: tuple[int, ...], apart: bool) -> None:
    widths = random_widths(choices)
    _, merged = merge_parallel(parallel_model(), widths, CPU.containers)
    assert list(merged) == (list(SIZES) if apart else ["block.q+k+v"])
    mixed = {**widths, "block.v": np.full(SIZES["block.v"], 16, np.int8)}
    assert list(merge_parallel(parallel_model(), mixed, CPU.containers)[1]) == ["block.q+k+v"]

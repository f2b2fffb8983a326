"""The tiny policy from torch to ONNX Runtime: equal actions, real packed weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from ort_graphs import packed_matmuls
from places import ROOT
from tiny_bundles import float_graph, make_bundle, mixed_plan
from tiny_policy import TINY_CONFIG, TINY_INSTRUCTIONS, TINY_SIZE

from engines.load import load_engine
from engines.targets import CPU
from engines.verify import judge, verify
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.graph.float_graph import ExportError, layer_nodes
from qvla_export.graph.part_export import RUN_KEY, RUN_NOTE
from qvla_export.graph.passes.couple import couple_mlps
from qvla_export.graph.passes.merge import merge_parallel
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.new_checkpoint import new_module, save_checkpoint
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.policies.prismatic.new_checkpoint import train_tokenizer
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactMismatch, PlanMismatch
from qvla_export.shared.observation import Observation

Observations = Callable[..., list[Observation]]


@pytest.fixture(scope="module")
def float_bundle(
    tiny_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    path = tmp_path_factory.mktemp("export") / "float"
    return make_bundle(tiny_policy, None, tiny_observations(8, seed=7), path)


@pytest.fixture(scope="module")
def mixed_bundle(
    tiny_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    path = tmp_path_factory.mktemp("export") / "mixed"
    return make_bundle(tiny_policy, mixed_plan(tiny_policy), tiny_observations(32, seed=8), path)


def test_a_quantized_graph_says_how_others_must_run_it(
    float_bundle: Bundle, mixed_bundle: Bundle
) -> None:
    """ONNX Runtime's own default rounds activations, which moves actions more than weights do."""
    notes = [
        ir.load(bundle.path / bundle.parts[0].model).metadata_props.get(RUN_KEY)
        for bundle in (float_bundle, mixed_bundle)
    ]
    assert notes == [None, RUN_NOTE]
    assert "session.qdq_matmulnbits_accuracy_level" in RUN_NOTE
    assert mixed_bundle.engine_options["accuracy_level"] == 0


def test_float_bundle_equals_torch(float_bundle: Bundle) -> None:
    with load_engine(float_bundle, threads=1) as engine:
        drift = verify(float_bundle, engine).drift
    assert drift.worst <= 1e-4
    assert drift.cosine > 0.999999


def test_mixed_bundle_equals_fake_quantized_torch(mixed_bundle: Bundle) -> None:
    golden = mixed_bundle.golden()
    with load_engine(mixed_bundle, threads=1) as engine:
        drift = judge(mixed_bundle, engine).drift
    assert drift.observations == 32
    assert drift.worst <= 1e-3
    # The plan is coarse enough that equality with the float policy would be a mistake.
    assert np.abs(golden.reference - golden.full_precision).max() > 0.05


def test_unpacked_weights_compute_the_same(mixed_bundle: Bundle) -> None:
    with load_engine(mixed_bundle, threads=1, weights="unpacked") as engine:
        assert judge(mixed_bundle, engine).drift.worst <= 1e-3


def test_no_gather_between_the_layers_of_an_mlp(mixed_bundle: Bundle) -> None:
    """Walk from each activation both ways until the weights' MatMuls."""
    graph = ir.load(mixed_bundle.model_path(mixed_bundle.parts[0])).graph
    seen: set[ir.Node] = set()
    todo = [node for node in graph if node.op_type in ("Gelu", "Sigmoid")]
    assert len(todo) >= 2 * (TINY_SIZE.vision_depth - 1) + TINY_SIZE.depth
    while todo:
        node = todo.pop()
        if node in seen or node.op_type in ("MatMul", "Gemm"):
            continue
        seen.add(node)
        todo += [v.producer() for v in node.inputs if v is not None and v.producer() is not None]
        todo += [use.node for use in node.outputs[0].uses()]
    assert {"Gelu", "Sigmoid", "Mul", "Concat"} <= {node.op_type for node in seen}
    assert "Gather" not in {node.op_type for node in seen}


def test_manifest_states_the_figures_of_the_graph(
    mixed_bundle: Bundle, tiny_policy: OftPolicy
) -> None:
    assert mixed_bundle.plan is not None
    figures = mixed_bundle.plan["graph"]
    graph = ir.load(mixed_bundle.model_path(mixed_bundle.parts[0])).graph
    assert figures["matmuls"] == [node.op_type for node in graph].count("MatMul")
    gathers = [node for node in graph if node.op_type == "Gather"]
    assert figures["order_gathers"] == len(gathers) - len(float_gathers(tiny_policy)) > 0
    plan = mixed_plan(tiny_policy)
    every = sum(len(w) * plan.weights_per_channel[n] for n, w in plan.widths.items())
    pruned = sum(int((w == 0).sum()) * plan.weights_per_channel[n] for n, w in plan.widths.items())
    assert figures["multiplications"] == every
    # Constant hidden units take the consumers' inputs and the other producer's channels along.
    assert pruned < figures["multiplications_removed"] < 3 * pruned


def float_gathers(policy: OftPolicy) -> list[ir.Node]:
    return [node for node in float_graph(policy).graph if node.op_type == "Gather"]


def test_golden_prompts_have_different_lengths(mixed_bundle: Bundle) -> None:
    lengths = {feeds["input_ids"].shape[1] for feeds in mixed_bundle.golden().feeds}
    assert len(lengths) > 1
    assert mixed_bundle.inputs[1].shape == (1, "prompt")


def test_every_packed_bucket_becomes_matmulnbits(
    mixed_bundle: Bundle, tiny_policy: OftPolicy, tmp_path: Path
) -> None:
    packed = packed_matmuls(
        mixed_bundle.model_path(mixed_bundle.parts[0]), tmp_path / "optimized.onnx"
    )
    plan = mixed_plan(tiny_policy)
    couplings = plan.couplings.values()
    coupled = couple_mlps(float_graph(tiny_policy), plan.widths, couplings, plan.containers)
    _, widths = merge_parallel(*coupled, CPU.containers)
    for bits in (2, 4, 8):
        assert packed[bits] == sum(bool((w == bits).any()) for w in widths.values())


def test_stored_bytes_are_exactly_the_plans(mixed_bundle: Bundle, tiny_policy: OftPolicy) -> None:
    stored = sum(n for part, n in mixed_bundle.weight_bytes.items() if part != "rest")
    assert stored == mixed_plan(tiny_policy).weight_bytes
    data = (mixed_bundle.path / "policy.onnx.data").stat().st_size
    assert data <= sum(mixed_bundle.weight_bytes.values())


def test_uniform_bytes_are_exactly_the_plans(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    plan = uniform_plan(layer_shapes(tiny_policy.layers()), 4, CPU, tiny_policy.digest)
    bundle = make_bundle(tiny_policy, plan, tiny_observations(1), tmp_path / "bundle")
    stored = sum(n for part, n in bundle.weight_bytes.items() if part != "rest")
    assert stored == plan.weight_bytes
    assert plan.weight_bytes <= 0.29 * plan.float16_bytes
    with load_engine(bundle, threads=1) as engine:
        assert judge(bundle, engine).drift.worst <= 1e-3


def test_checkpoint_weights_are_stored_in_16_bits(float_bundle: Bundle) -> None:
    graph = ir.load(float_bundle.model_path(float_bundle.parts[0])).graph
    wide = [
        value.name
        for value in graph.initializers.values()
        if value.dtype == ir.DataType.FLOAT and np.prod(value.shape.numpy()) >= 64  # type: ignore[union-attr]
    ]
    assert wide == []


def test_dead_layers_are_absent(tiny_policy: OftPolicy) -> None:
    graph = float_graph(tiny_policy)
    linears = [
        name
        for name, layer in tiny_policy.module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        and name.startswith(("vision_backbone.", "language_model.model."))
    ]
    assert set(layer_nodes(graph)) == set(tiny_policy.layers()) < set(linears)
    last = f"layer.{TINY_SIZE.vision_depth - 1}."
    assert not any(last in str(name) for name in graph.graph.initializers)


def test_graph_does_not_name_the_exporting_machine(mixed_bundle: Bundle) -> None:
    assert (
        b"/" + ROOT.name.encode() not in mixed_bundle.model_path(mixed_bundle.parts[0]).read_bytes()
    )
    assert b".py" not in mixed_bundle.model_path(mixed_bundle.parts[0]).read_bytes()


def test_token_policy_with_two_cameras_puts_out_the_greedy_action(
    tiny_observations: Observations, tmp_path: Path
) -> None:
    cameras = ("image", "wrist")
    config = dataclasses.replace(
        TINY_CONFIG, cameras=cameras, head="tokens", horizon=2, state_dim=0
    )
    bounds = {"q01": [-1.0] * 4, "q99": [1.0] * 4}
    tokenizer = train_tokenizer(TINY_INSTRUCTIONS, TINY_SIZE.vocab_size)
    module = new_module(TINY_SIZE, config, seed=3)
    statistics = {"tiny": {"action": bounds}}
    save_checkpoint(tmp_path / "checkpoint", module, config, tokenizer, statistics, step=0)
    policy = load_oft_policy(tmp_path / "checkpoint")
    both = zip(tiny_observations(4), tiny_observations(4, seed=1), strict=True)
    observations = [
        dataclasses.replace(a, images={"image": a.images["image"], "wrist": b.images["image"]})
        for a, b in both
    ]
    bundle = make_bundle(policy, mixed_plan(policy), observations, tmp_path / "bundle")
    assert [spec.name for spec in bundle.inputs] == ["pixel_values", "input_ids"]
    assert bundle.inputs[0].shape == (1, 12, 28, 28)
    with load_engine(bundle, threads=1) as engine:
        assert judge(bundle, engine).drift.worst <= 1e-6


def test_plan_of_another_policy_is_refused(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    plan = dataclasses.replace(mixed_plan(tiny_policy), policy_digest="0" * 64)
    with pytest.raises(PlanMismatch, match="0000"):
        make_bundle(tiny_policy, plan, tiny_observations(1), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_plan_for_another_target_is_refused(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    plan = dataclasses.replace(mixed_plan(tiny_policy), target="orin")
    with pytest.raises(ArtifactMismatch, match="orin"):
        export_bundle(tiny_policy, plan, CPU, tiny_observations(1), tmp_path / "bundle")


def test_float_graph_of_another_policy_is_refused(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    other = dataclasses.replace(tiny_policy, digest="1" * 64)
    options = ExportOptions({"policy": float_graph(tiny_policy)})
    with pytest.raises(ArtifactMismatch, match="1111"):
        export_bundle(other, None, CPU, tiny_observations(1), tmp_path / "b", options)
    with pytest.raises(ExportError, match="at least one golden observation"):
        export_bundle(tiny_policy, None, CPU, [], tmp_path / "b", options)


def test_layer_missing_from_the_graph_is_refused(
    tiny_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dead = tiny_policy.module.get_submodule(
        f"vision_backbone.featurizer.encoder.layer.{TINY_SIZE.vision_depth - 1}.mlp.fc1"
    )
    layers = {**tiny_policy.layers(), "tower.dead": dead}
    monkeypatch.setattr(OftPolicy, "layers", lambda self: layers)
    with pytest.raises(ExportError, match=r"not found in the exported graph.*tower\.dead"):
        export_bundle(
            tiny_policy,
            None,
            CPU,
            tiny_observations(1),
            tmp_path / "b",
            ExportOptions({"policy": float_graph(tiny_policy)}),
        )

"""A policy cut into parts, its weights left on disk: the same actions, and exports that resume."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny_bundles import make_bundle, mixed_plan
from tiny_policy import TINY_SIZE

import qvla_export.graph.export
import qvla_export.graph.part_export
from engines.base import EngineError
from engines.ort import OrtEngine
from engines.targets import CPU
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.graph.float_graph import export_part
from qvla_export.graph.golden import golden_actions
from qvla_export.measurement.measure_activations import measure_activations
from qvla_export.policies.base import Policy, PolicyPart
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.shared.artifacts import sha256_file
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.observation import Observation

Observations = Callable[..., list[Observation]]
PARTS = ["dino", "siglip", "projector", "decoder_00", "decoder_01", "head"]


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """Trace each part once, which takes seconds: what becomes of it is tested here."""
    graphs: dict[tuple[str, str], ir.Model] = {}

    def traced(policy: Policy, part: PolicyPart, *rest: Any) -> ir.Model:
        key = (policy.digest, part.name)
        if key not in graphs:
            graphs[key] = export_part(policy, part, *rest)
        return graphs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qvla_export.graph.part_export, "export_part", traced)
        yield


@pytest.fixture(scope="module")
def stored_policy(tiny_checkpoint: Path) -> OftPolicy:
    return load_oft_policy(tiny_checkpoint, resident=False)


@pytest.fixture(scope="module")
def bundle_in_parts(
    stored_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    path = tmp_path_factory.mktemp("staged") / "bundle"
    plan = mixed_plan(stored_policy)
    return export_bundle(
        stored_policy,
        plan,
        CPU,
        tiny_observations(3, seed=4),
        path,
        ExportOptions(layers_per_part=1),
    )


def test_weights_on_disk_make_the_same_policy(
    stored_policy: OftPolicy, tiny_policy: OftPolicy
) -> None:
    assert all(tensor.is_meta for tensor in stored_policy.module.state_dict().values())
    assert stored_policy.digest == tiny_policy.digest
    assert list(stored_policy.layers()) == list(tiny_policy.layers())
    unused = "vision_backbone.featurizer.embeddings.mask_token"
    for name in tiny_policy.module.state_dict():
        if name != unused:
            np.testing.assert_array_equal(
                stored_policy.read_weight(name), tiny_policy.read_weight(name)
            )


def test_parts_are_those_of_the_whole(
    bundle_in_parts: Bundle,
    tiny_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path: Path,
) -> None:
    observations = tiny_observations(3, seed=4)
    whole = make_bundle(tiny_policy, mixed_plan(tiny_policy), observations, tmp_path / "whole")
    assert [part.name for part in bundle_in_parts.parts] == PARTS
    assert [part.name for part in whole.parts] == ["policy"]
    assert set(bundle_in_parts.inputs) == set(whole.inputs)
    assert bundle_in_parts.outputs == whole.outputs
    kinds = ("2", "4", "8", "16", "scales")
    assert [bundle_in_parts.weight_bytes[k] for k in kinds] == [
        whole.weight_bytes[k] for k in kinds
    ]
    assert bundle_in_parts.plan is not None and whole.plan is not None
    for figure in ("matmuls", "order_gathers", "multiplications", "multiplications_removed"):
        assert bundle_in_parts.plan["graph"][figure] == whole.plan["graph"][figure]
    np.testing.assert_allclose(
        bundle_in_parts.golden().reference, whole.golden().reference, atol=1e-5
    )


def test_torch_in_parts_rounds_activations_as_the_whole_does(
    stored_policy: OftPolicy,
    tiny_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path: Path,
) -> None:
    observations = tiny_observations(3, seed=4)
    fed = measure_activations(tiny_policy, observations, "c" * 64)
    plain = mixed_plan(tiny_policy)
    plan = dataclasses.replace(plain, activations=fed.ranges(8, "max"))
    whole, unrounded = (golden_actions(tiny_policy, p, observations) for p in (plan, plain))
    staged = export_bundle(
        stored_policy,
        plan,
        CPU,
        observations,
        tmp_path / "staged",
        ExportOptions(layers_per_part=1),
    ).golden()
    difference = np.abs(staged.reference - whole.reference).max()
    assert difference < 1e-5 < 1e-3 < np.abs(whole.reference - unrounded.reference).max()
    np.testing.assert_allclose(staged.full_precision, whole.full_precision, atol=1e-5)


@pytest.mark.parametrize("keep_loaded", [True, False])
def test_an_engine_of_parts_equals_torch(bundle_in_parts: Bundle, keep_loaded: bool) -> None:
    golden = bundle_in_parts.golden()
    with OrtEngine(bundle_in_parts, threads=1, keep_loaded=keep_loaded) as engine:
        actions = np.concatenate([engine.infer(feeds)["actions"] for feeds in golden.feeds])
    np.testing.assert_allclose(actions, golden.reference, atol=1e-4)
    assert np.abs(golden.reference - golden.full_precision).max() > 0.01
    with pytest.raises(EngineError, match="closed"):
        engine.infer(golden.feeds[0])


class StopsAfter:
    """A progress callback that breaks off, as a user does."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def __call__(self, done: int, total: int) -> None:
        # Golden actions of the plan and in float call every part once more.
        assert total == 3 * len(PARTS)
        if done == self.parts:
            raise KeyboardInterrupt


def test_interrupted_export_goes_on(
    stored_policy: OftPolicy,
    bundle_in_parts: Bundle,
    tiny_observations: Observations,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced: list[str] = []
    original = qvla_export.graph.export.write_part

    def recorded(policy: OftPolicy, part: Any, *rest: Any) -> Any:
        traced.append(part.name)
        return original(policy, part, *rest)

    monkeypatch.setattr(qvla_export.graph.export, "write_part", recorded)
    plan, observations = mixed_plan(stored_policy), tiny_observations(3, seed=4)

    def export(plan: Any = plan, **named: Any) -> Bundle:
        return export_bundle(
            stored_policy,
            plan,
            CPU,
            observations,
            tmp_path / "b",
            ExportOptions(layers_per_part=1),
            **named,
        )

    with pytest.raises(KeyboardInterrupt):
        export(on_progress=StopsAfter(2))
    assert traced == PARTS[:2] and not (tmp_path / "b").exists()
    # A half-written file of a finished part is not trusted.
    data = tmp_path / ".b.unfinished" / "siglip.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    traced.clear()
    told: list[tuple[int, int]] = []
    bundle = export(on_progress=lambda done, total: told.append((done, total)))
    assert traced == PARTS[1:]
    assert told == [(number + 1, 3 * len(PARTS)) for number in range(3 * len(PARTS))]
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]
    for part in bundle.parts:
        assert sha256_file(bundle.model_path(part)) == sha256_file(bundle_in_parts.model_path(part))
    # What was begun for another plan is not used.
    with pytest.raises(KeyboardInterrupt):
        export(on_progress=StopsAfter(2))
    traced.clear()
    with pytest.raises(KeyboardInterrupt):
        export(mixed_plan(stored_policy, seed=1), on_progress=StopsAfter(1))
    assert traced == PARTS[:1]


def test_blocks_of_a_stage_may_be_any_number(tiny_policy: OftPolicy) -> None:
    names = [part.name for part in tiny_policy.parts(layers_per_part=TINY_SIZE.depth)]
    assert names == ["dino", "siglip", "projector", "decoder", "head"]
    with pytest.raises(CheckpointError, match="at least 1"):
        tiny_policy.parts(layers_per_part=0)


def test_token_head_must_be_loaded_whole(tiny_checkpoint: Path, tiny_policy: OftPolicy) -> None:
    config: OftConfig = dataclasses.replace(tiny_policy.config, head="tokens")
    with pytest.raises(CheckpointError, match="head of tokens"):
        load_oft_policy(tiny_checkpoint, config=config, resident=False)

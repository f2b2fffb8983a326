"""The shipped policy: it solves its tasks, and its engine does what torch does."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ort_graphs import packed_matmuls
from places import REFERENCE

from calibration.benchmarks.metaworld.tasks import TASKS
from calibration.benchmarks.rollouts import RolloutConfig, RolloutJob, evaluate
from calibration.calibration_set import CalibrationSet, sample_simulator
from engines.load import load_engine
from engines.targets import CPU
from jetson.policy import EnginePolicy
from qvla_export.allocation.allocate import Budget, allocate_bits
from qvla_export.graph.export import export_bundle
from qvla_export.graph.golden import golden_actions
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import QuantizerSpec, spec_for
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order
from qvla_export.shared.bundle import Bundle


@pytest.fixture(scope="module")
def policy() -> OftPolicy:
    return load_oft_policy(REFERENCE)


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    return sample_simulator(list(TASKS), 16, 32, seed=7)


@pytest.fixture(scope="module")
def plan(policy: OftPolicy, calibration: CalibrationSet) -> BitPlan:
    settings = FirstOrder(spec_for(CPU), probes=4)
    sensitivities = measure_first_order(
        policy, calibration.observations, calibration.digest, settings
    )
    uniform = uniform_plan(layer_shapes(policy.layers()), 4, CPU, policy.digest)
    return allocate_bits(sensitivities, Budget("bits per channel", 4.0, uniform.ratio), CPU)


@pytest.fixture(scope="module")
def bundle(
    policy: OftPolicy,
    plan: BitPlan,
    calibration: CalibrationSet,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    path = tmp_path_factory.mktemp("reference") / "bundle"
    return export_bundle(policy, plan, CPU, calibration.held_out[:2], path)


def test_every_layer_is_a_multiple_of_64_wide(policy: OftPolicy) -> None:
    shapes = layer_shapes(policy.layers())
    assert {channels % 64 for channels, _ in shapes.values()} == {0}
    size = sum(file.stat().st_size for file in REFERENCE.iterdir())
    assert size < 25_000_000


def test_four_mean_bits_fit_the_bytes_and_beat_round_to_nearest(
    policy: OftPolicy, plan: BitPlan, calibration: CalibrationSet
) -> None:
    assert plan.mean_bits_per_channel <= 4.0
    assert plan.ratio <= 0.29
    plain = QuantizerSpec({b: replace(r, scale="max") for b, r in spec_for(CPU).rules.items()})
    nearest = uniform_plan(layer_shapes(policy.layers()), 4, CPU, policy.digest, plain)
    assert plan.weight_bytes <= nearest.weight_bytes
    errors = []
    for made in (plan, nearest):
        golden = golden_actions(policy, made, calibration.held_out)
        errors.append(float(np.sqrt(np.square(golden.reference - golden.full_precision).mean())))
    assert errors[0] <= 0.5 * errors[1]


def test_engine_equals_torch_on_32_held_out_observations(
    policy: OftPolicy, plan: BitPlan, calibration: CalibrationSet, bundle: Bundle
) -> None:
    golden = golden_actions(policy, plan, calibration.held_out)
    assert len(calibration.held_out) == 32
    with load_engine(bundle, threads=1) as engine:
        robot = EnginePolicy(bundle, engine)
        actions = np.stack([robot.infer(o).normalized for o in calibration.held_out])
    assert np.abs(actions - golden.reference).max() <= 1e-3


def test_the_optimized_graph_computes_with_packed_weights(bundle: Bundle, tmp_path: Path) -> None:
    packed = packed_matmuls(bundle.model_path(bundle.parts[0]), tmp_path / "optimized.onnx")
    assert set(packed) == {2, 4, 8}


def _open(path: Path) -> OftPolicy:
    return load_oft_policy(path)


def test_the_policy_solves_its_tasks(tmp_path: Path) -> None:
    config = RolloutConfig(tuple(TASKS), episodes=3)
    factory = partial(_open, REFERENCE)
    result = evaluate(RolloutJob("float", "x", factory, config), tmp_path / "e.json", workers=1)
    assert result.success() >= 0.6
    blind = RolloutConfig(tuple(TASKS), episodes=3, control="blank-image")
    unseeing = evaluate(RolloutJob("float", "x", factory, blind), tmp_path / "b.json", workers=1)
    assert unseeing.success() <= 0.6 * result.success()

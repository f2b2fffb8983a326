"""What holds of a target whatever form its scales have: plain, with zero points, of two levels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from ort_graphs import LAYER, linear_model, packed_matmuls, run_model
from tiny_bundles import make_bundle, mixed_plan

from calibration.calibration_set import CalibrationSet
from engines.check.bundle import check_bundle
from engines.check.finding import require_no_errors
from engines.load import load_engine
from engines.targets import CPU
from engines.verify import judge
from qvla_export.allocation.setting import parse_setting
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.measurement.measure_moments import measure_moments
from qvla_export.pipeline.activations import activations as record_activations
from qvla_export.pipeline.plan import plan as plan_setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, sensitivities
from qvla_export.policies.base import Policy
from qvla_export.quantizer.packed_storage import bucket_bytes
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import compensated_spec, fake_quantize, spec_for
from qvla_export.quantizer.round_plan import round_plan
from qvla_export.quantizer.rounding import Rounding
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import Target

_WIDTHS = [0, 2, 4, 8, 16]


def check_buckets_on_ort(
    target: Target, mean: float, channels: int, inputs: int, folder: Path
) -> None:
    """A layer's buckets compute what its quantizer says, in the bytes that the target states.

    Args:
        target: whose containers store the codes.
        mean: of the weights, whose deviation is 1.
        channels, inputs: of the layer.
        folder: for the graphs.
    """
    generator = np.random.default_rng(channels + inputs)
    weight = generator.normal(mean, 1, (channels, inputs)).astype(np.float32)
    widths = generator.choice(_WIDTHS, channels).astype(np.int8)
    stored: list[int] = []

    def store(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        stored.append(tensor.nbytes)
        return tensor

    how = spec_for(target)
    graph = bucketize(linear_model(weight, None), {LAYER: widths}, how, target, store)
    x: NDArray[np.float32] = generator.standard_normal((1, 3, inputs)).astype(np.float32)
    expected = x @ fake_quantize(weight, widths, how).T
    np.testing.assert_allclose(run_model(graph, x, folder), expected, atol=1e-4)
    packed = packed_matmuls(folder / "model.onnx", folder / "optimized.onnx")
    assert packed == dict.fromkeys(set(widths.tolist()) - {0, 16}, 1)
    assert sum(stored) == sum(
        bucket_bytes(int((widths == bits).sum()), inputs, target.containers[bits])
        for bits in set(widths.tolist()) - {0}
    )


def check_compensated_bundle(
    target: Target, policy: Policy, observations: Sequence[Observation], folder: Path
) -> BitPlan:
    """Compensated codes come back from their file, and a bundle of them acts as torch does.

    Returns:
        The plan with its codes.
    """
    moments = measure_moments(policy, observations[:6], "c" * 64)
    spec = compensated_spec(target)
    formed = replace(mixed_plan(policy), containers=dict(target.containers), quantizer=spec)
    plan = round_plan(policy, formed, moments)
    assert plan.rounding is not None
    plan.rounding.save(folder / "rounding")
    assert Rounding.load(folder / "rounding").digest == plan.rounding.digest
    bundle = make_bundle(policy, plan, observations[6:], folder / "bundle")
    _require_bytes(bundle, plan)
    with load_engine(bundle, threads=1) as engine:
        assert judge(bundle, engine).drift.worst <= 1e-3
    return plan


def check_run(
    target: Target, policy: Policy, observations: Sequence[Observation], folder: Path
) -> BitPlan:
    """A run's planned `w4a8` follows its sensitivities' form of scales; uniform baselines do not.

    Args:
        target: the form.
        policy: whose.
        observations: eight to measure on, the others to judge by.
        folder: of the run.

    Returns:
        The plan.
    """
    run = RunFolder(folder)
    CalibrationSet(tuple(observations[:8]), tuple(observations[8:]), {"test": 1}).save(
        run.calibration
    )
    request = SensitivityRequest(quantizer="nearest", probes=2)
    assert sensitivities(run, policy, target, request).quantizer == spec_for(target)
    record_activations(run, policy)
    # The target of plain scales.
    plan = plan_setting(run, parse_setting("w4a8"), CPU, policy.digest)
    assert plan is not None and plan.containers == target.containers
    baseline = plan_setting(run, parse_setting("w4-rtn"), CPU, policy.digest)
    assert baseline is not None and baseline.containers == CPU.containers
    bundle = make_bundle(policy, plan, observations[8:], folder / "bundle")
    _require_bytes(bundle, plan)
    with load_engine(bundle, threads=1) as engine:
        drift = judge(bundle, engine).drift
    # Rounded activations that lie on a tie fall to either side.
    assert drift.mean_normalized.max() <= 5e-2
    return plan


def _require_bytes(bundle: Bundle, plan: BitPlan) -> None:
    layers = sum(n for part, n in bundle.weight_bytes.items() if part != "rest")
    assert layers == plan.weight_bytes
    require_no_errors(check_bundle(bundle, CPU))

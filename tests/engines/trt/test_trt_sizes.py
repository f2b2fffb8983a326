"""TensorRT builds the reference policy, and its engine holds the bytes that the plan promised."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from places import REFERENCE

from calibration.benchmarks.metaworld.tasks import TASKS
from calibration.calibration_set import CalibrationSet, sample_simulator
from engines.targets import RTX4070
from engines.trt.builder import build_engines
from engines.trt.sizes import BundleSizes, measure_sizes
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.graph.float_graph import export_float
from qvla_export.measurement.measure_activations import measure_activations
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.uniform_plan import uniform_plan

SETTINGS = ("float", "w8", "w4", "w8a8", "mixed")


def plan_of(policy: OftPolicy, setting: str, calibration: CalibrationSet) -> BitPlan | None:
    if setting == "float":
        return None
    bits = 4 if setting == "mixed" else int(setting[1])
    plan = uniform_plan(layer_shapes(policy.layers()), bits, RTX4070, policy.digest)
    if setting == "mixed":
        return replace(plan, widths=mixed_widths(plan), budget="random")
    if not setting.endswith("a8"):
        return plan
    fed = measure_activations(policy, calibration.observations, calibration.digest)
    return replace(plan, activations=fed.ranges(8, "percentile"))


def mixed_widths(plan: BitPlan) -> dict[str, NDArray[np.int8]]:
    generator = np.random.default_rng(0)
    shares = [0.05, 0.2, 0.5, 0.2, 0.05]
    return {
        name: generator.choice([0, 2, 4, 8, 16], len(widths), p=shares).astype(np.int8)
        for name, widths in plan.widths.items()
    }


@pytest.fixture(scope="module")
def sizes(trt_home: Path) -> dict[str, BundleSizes]:
    policy = load_oft_policy(REFERENCE)
    calibration = sample_simulator(list(TASKS), 4, 1, seed=7)
    graph = export_float(policy, RTX4070)
    found = {}
    for setting in SETTINGS:
        plan = plan_of(policy, setting, calibration)
        path = trt_home / setting / "bundle"
        bundle = export_bundle(
            policy, plan, RTX4070, calibration.held_out, path, ExportOptions(graph)
        )
        sidecars = build_engines(bundle, trt_home / setting / "engines", find=lambda: None)
        found[setting] = measure_sizes(bundle, sidecars)
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_engine_holds_what_the_plan_promised(
    sizes: dict[str, BundleSizes], setting: str
) -> None:
    size = sizes[setting]
    assert size.engine_weight_bytes is not None and size.engine_bytes is not None
    assert abs(size.engine_weight_bytes / size.planned_bytes - 1) < 0.1
    assert abs(size.onnx_bytes / size.planned_bytes - 1) < 0.1
    # Nothing is unpacked or stored twice: the layers alone are half of the whole.
    assert abs(size.engine_weight_bytes / size.onnx_bytes - 1) < 0.02
    # Kernels, which no plan counts: 5 to 10 MB, 23 MB where every layer has every width.
    assert 0 < size.engine_bytes - size.engine_weight_bytes < 40e6


def test_fewer_bits_are_fewer_bytes(sizes: dict[str, BundleSizes]) -> None:
    weights = {name: size.engine_weight_bytes or 0 for name, size in sizes.items()}
    assert weights["float"] > 1.5 * weights["w8"] > 2 * weights["w4"] > 0
    assert weights["w8a8"] == pytest.approx(weights["w8"], rel=0.02)
    assert sizes["w4"].ratio < sizes["w8"].ratio < sizes["float"].ratio == pytest.approx(1, abs=0.1)

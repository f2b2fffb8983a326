"""The stage that exports bundles, and keeps those that are up to date."""

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import Progress

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.moments import attached
from qvla_export.pipeline.plan import bar, kept_artifact, load_plan, require_calibration
from qvla_export.pipeline.run_folder import RunFolder, made
from qvla_export.quantizer.plan import BitPlan
from qvla_export.shared.artifacts import sha256_file
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy
    from qvla_export.shared.bundle import Bundle

# Policy digest and target -> float graph.
_GRAPHS: dict[tuple[str, str], Any] = {}


def export(
    run: RunFolder,
    setting: Setting,
    policy: "Policy",
    target: Target,
    layers_per_part: int | None = None,
    accuracy_level: int = 0,
) -> "Bundle":
    """Export a setting's bundle, or keep the one of the same policy, plan, target and stages."""
    from calibration.calibration_set import CalibrationSet
    from qvla_export.graph.export import ExportOptions, export_bundle, unfinished_folder
    from qvla_export.policies.layers import layer_shapes
    from qvla_export.shared.bundle import Bundle

    path = run.bundle(setting)
    planned = load_plan(run, setting, rounded=False)
    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    if planned is not None and planned.calibration_digest is not None:
        require_calibration(calibration, planned.calibration_digest, "plan")
    if planned is not None:
        planned.require_fits(layer_shapes(policy.layers()), policy.digest)
        planned = attached(run, setting, planned)
    golden = calibration.held_out[:8]
    kept = kept_artifact(path, Bundle.load)
    options = {"accuracy_level": accuracy_level}
    stages = [stage.name for stage in policy.parts(layers_per_part)]
    if (
        kept is not None
        and (kept.target, [stage.name for stage in kept.parts]) == (target.name, stages)
        and dict(kept.engine_options) == options
        and _is_of(kept, policy, planned, run, setting)
        and _has_golden(kept, policy, golden)
    ):
        # Of a kill after the bundle was in place.
        shutil.rmtree(unfinished_folder(path), ignore_errors=True)
        return kept
    graph = _float_graph(policy, target) if layers_per_part is None else None
    with Progress(transient=True) as progress:
        return export_bundle(
            policy,
            planned,
            target,
            golden,
            path,
            ExportOptions(graph, options, layers_per_part),
            on_progress=bar(progress, "stages"),
        )


def graph_figures(bundle: "Bundle") -> str:
    """Say what the plan made of the graph, and its constants' bytes by width."""
    sizes = ", ".join(
        f"{part} {nbytes:,}" for part, nbytes in bundle.weight_bytes.items() if nbytes
    )
    if bundle.plan is None:
        return f"constants, bytes: {sizes}"
    figures = bundle.plan["graph"]
    removed = figures["multiplications_removed"] / figures["multiplications"]
    return (
        f"graph: {figures['nodes']} nodes, {figures['matmuls']} MatMuls, "
        f"{figures['order_gathers']} Gathers that restore an order "
        f"({figures['mlp_gathers']} behind MLP producers), {removed:.1%} of the planned "
        f"multiplications removed; constants by width, bytes: {sizes}"
    )


def _float_graph(policy: "Policy", target: Target) -> Any:
    """Trace the policy once for all settings of a run."""
    from qvla_export.graph.float_graph import export_float

    key = (policy.digest, target.name)
    if key not in _GRAPHS:
        _GRAPHS.clear()
        _GRAPHS[key] = export_float(policy, target)
    return _GRAPHS[key]


def _is_of(
    bundle: "Bundle", policy: "Policy", planned: BitPlan | None, run: RunFolder, setting: Setting
) -> bool:
    if bundle.policy_digest != policy.digest or (bundle.plan is None) != (planned is None):
        return False
    if planned is None:
        return True
    assert bundle.plan is not None
    rounding = None if planned.rounding is None else planned.rounding.digest
    same = bundle.plan.get("rounding_digest") == rounding
    return same and sha256_file(bundle.path / "plan.json") == sha256_file(run.plan(setting))


def _has_golden(bundle: "Bundle", policy: "Policy", golden: Sequence[Observation]) -> bool:
    stored = bundle.golden().feeds
    wanted = [policy.processor.feeds(observation) for observation in golden]
    return len(stored) == len(wanted) and all(
        set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(stored, wanted, strict=True)
    )

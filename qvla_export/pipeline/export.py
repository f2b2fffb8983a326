"""The step that exports bundles, and keeps those that are up to date."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.calibrate import load_calibration, require_calibration
from qvla_export.pipeline.plan import digest_of_codes, load_plan, with_codes
from qvla_export.pipeline.progress import OnProgress, bar, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current
from qvla_export.pipeline.work.log import ArtifactWork, Value, recorded_work, short
from qvla_export.quantizer.plan import BitPlan
from qvla_export.shared.artifacts import sha256_file
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy
    from qvla_export.shared.bundle import Bundle

# Held-out observations whose actions lie in a bundle, at most.
_GOLDEN, _GOLDEN_OF_CACHES = 8, 2
# Policy digest and target -> float graphs by part.
_GRAPHS: dict[tuple[str, str], Any] = {}


def export(
    run: RunFolder,
    setting: Setting,
    policy: "Policy",
    target: Target,
    layers_per_part: int | None = None,
    accuracy_level: int = 0,
    on_progress: OnProgress = ignore,
) -> "Bundle":
    """Export a setting's bundle, or keep the one of the same policy, plan, target and parts."""
    from qvla_export.graph.export import ExportOptions, export_bundle, unfinished_folder
    from qvla_export.policies.layers import layer_shapes
    from qvla_export.shared.bundle import Bundle

    path = run.bundle(setting)
    planned = load_plan(run, setting, with_rounded_codes=False)
    calibration = load_calibration(run)
    if planned is not None and planned.calibration_digest is not None:
        require_calibration(calibration, planned.calibration_digest, "plan")
    if planned is not None:
        planned.require_fits(layer_shapes(policy.layers()), policy.digest)
        planned = with_codes(run, setting, planned)
    golden = calibration.held_out[: _golden_count(policy)]
    options = {"accuracy_level": accuracy_level}
    parts = [part.name for part in policy.parts(layers_per_part)]
    work = f"export, {setting.name}"
    current = load_if_current(
        path,
        Bundle.load,
        lambda old: (
            (old.target, [part.name for part in old.parts]) == (target.name, parts)
            and dict(old.engine_options) == options
            and _is_of(old, policy, planned, run, setting)
            and _has_golden(old, policy, golden)
        ),
    )
    if current is not None:
        # Of a kill after the bundle was in place.
        shutil.rmtree(unfinished_folder(path), ignore_errors=True)
        finish(on_progress, work, kept=True)
        return current
    settings: dict[str, Value] = {
        "--policy": short(policy.digest),
        "plan": None if planned is None else short(planned.digest),
        "codes": None if planned is None else short(digest_of_codes(planned)),
        "calibration set": short(calibration.digest),
        "--target": target.name,
        "--layers-per-part": layers_per_part,
        "--accuracy-level": accuracy_level,
    }
    record = ArtifactWork(run, path, settings, _sources(run, setting, planned))
    with recorded_work(record, on_progress) as hear:
        shown = bar(hear, work)
        shown(0, len(parts))
        graphs = _float_graphs(policy, target) if layers_per_part is None else {}
        bundle = export_bundle(
            policy,
            planned,
            target,
            golden,
            path,
            ExportOptions(graphs, options, layers_per_part),
            on_progress=shown,
        )
    finish(on_progress, work, kept=False)
    return bundle


def _golden_count(policy: "Policy") -> int:
    """Return of how many observations a bundle has actions, which are computed side by side.

    Of a policy that decodes part by part each of them holds its keys and values: 0.3 GB of a 7B.
    """
    from qvla_export.policies.layers import weights_on_disk

    decodes = max(policy.program().calls.values()) > 1
    return _GOLDEN_OF_CACHES if decodes and weights_on_disk(policy) else _GOLDEN


def _sources(run: RunFolder, setting: Setting, planned: BitPlan | None) -> tuple[Path, ...]:
    """Artifacts that a bundle is made of."""
    if planned is None:
        return (run.calibration,)
    rounded = () if planned.rounding is None else (run.rounding(setting),)
    return (run.calibration, run.plan(setting), *rounded)


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


def _float_graphs(policy: "Policy", target: Target) -> Any:
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
    feeds = [policy.processor.feeds(observation) for observation in golden]
    return len(stored) == len(feeds) and all(
        set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(stored, feeds, strict=True)
    )

"""Published weights quantized by the method and by other libraries, at equal bytes: a test bed.

What a network puts out stands for the action, so that every step of the method, and every library,
is what it is for a policy.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qvla_export.allocation.plan_request import PlanOverrides, PlanRequest
from qvla_export.allocation.setting import Setting, parse_setting
from qvla_export.comparison.paired import mean_difference
from qvla_export.pipeline import baseline as libraries
from qvla_export.pipeline.bench.changed_outputs import Change, Outputs, change_under, outputs_of
from qvla_export.pipeline.bench.weights_figures import (
    ErrorRatio,
    WeightsComparison,
    WeightsRequest,
    WeightsRow,
)
from qvla_export.pipeline.calibrate import (
    CalibrationRequest,
    calibrate,
    chosen_tasks,
    load_calibration,
    put_calibration,
)
from qvla_export.pipeline.moments import moments
from qvla_export.pipeline.plan import PlanOptions, load_sensitivities, plan
from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.pipeline.round import round_setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import sensitivities
from qvla_export.pipeline.work.log import cpu_s
from qvla_export.policies.families import find_backbone
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from calibration.calibration_set import CalibrationSet
    from qvla_export.baselines.environment import BaselineEnvironment
    from qvla_export.baselines.methods import BaselineRequest
    from qvla_export.pipeline.resources import Resources
    from qvla_export.policies.backbone import Backbone
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.shared.target import Target

OURS = "ours"
# The nearest codes of one width, by our own code: at 2, 4 and 8 bits, which the target stores.
RTN = "rtn"
_TARGET = "cpu"
# Of a run folder.
FIGURES = "weights.json"


@dataclass(frozen=True)
class _Bed:
    """What all methods are judged on."""

    run: RunFolder
    policy: "Policy"
    source: PolicySource
    target: "Target"
    calibration: "CalibrationSet"
    before: Outputs

    def judge(self, changed: AbstractContextManager[None]) -> Change:
        """Return what a block does to the outputs of the held-out observations."""
        return change_under(self.policy, self.calibration.held_out, self.before, changed)


def bench_weights(
    run: RunFolder,
    request: WeightsRequest,
    environment: "BaselineEnvironment",
    resources: "Resources | None" = None,
    on_progress: OnProgress = ignore,
) -> WeightsComparison:
    """Quantize a published network by the method and by others, and judge all on the same outputs.

    Ours have at most the fewest bytes of the others at that width. What is in the run is kept.

    Args:
        run: its folder; made if it is not there.
        request: what to quantize and how.
        environment: where the libraries are.
        resources: memory for sensitivities; None for as much as they take.
        on_progress: hears of every step.

    Raises:
        QvlaError: the network's package or a library is missing, or no such method or width.
    """
    from engines.targets import find_target
    from qvla_export.baselines.methods import METHODS

    backbone, target = find_backbone(request.backbone), find_target(_TARGET)
    by_bits = _library_requests(request, target)
    if any(METHODS[job.method].installed_apart for jobs in by_bits.values() for job in jobs):
        environment.python()  # says what is missing before much is measured
    place = run.root / "network"
    backbone.put(place)
    calibration = _calibrate(run, backbone, request, on_progress)
    policy = open_checkpoint(place)
    before = outputs_of(policy, calibration.held_out)
    bed = _Bed(run, policy, PolicySource(str(place)), target, calibration, before)
    moments(run, policy, resources, request.largest_block, on_progress)
    sensitivities(run, policy, target, resources=resources, on_progress=on_progress)
    rows: list[WeightsRow] = []
    tell = bar(on_progress, "methods and widths")
    for bits in request.bits:
        others = [_by_rounding(bed, bits, on_progress)] if RTN in request.methods else []
        others += [_by_library(bed, job, environment, on_progress) for job in by_bits[bits]]
        fewest = min(row.weight_bytes for row, _ in others)
        ours, change = _by_us(bed, bits, fewest, request.tune_codes, on_progress)
        rows.append(ours)
        for row, other in others:
            rows.append(replace(row, ours_over=_ratio(change, other, calibration)))
        tell(request.bits.index(bits) + 1, len(request.bits))
    compared = WeightsComparison(
        request,
        backbone.output,
        calibration.source,
        policy.digest,
        calibration.digest,
        None if before.surprise is None else float(before.surprise.mean()),
        sum(cpu_s(run, path) or 0.0 for path in (run.moments, run.sensitivities)),
        tuple(rows),
    )
    compared.save(run.root / FIGURES)
    return compared


def _library_requests(
    request: WeightsRequest, target: "Target"
) -> "dict[int, list[BaselineRequest]]":
    """Return what libraries are asked at each width; refuses what cannot be done, before work."""
    if not request.bits or not request.methods:
        raise QvlaError("at least one width and one method to compare with are needed; see --help")
    for bits in request.bits:
        if RTN in request.methods and bits not in target.containers:
            raise QvlaError(
                f"rtn stores widths that target {target.name} has, got {bits} bits; max of "
                "--methods rounds to the nearest codes at 3 bits, too"
            )
    methods = [method for method in request.methods if method != RTN]
    return {
        bits: [
            libraries.request_for(target, method, bits, None, request.seed, request.iterations)
            for method in methods
        ]
        for bits in request.bits
    }


def _calibrate(
    run: RunFolder, backbone: "Backbone", request: WeightsRequest, on_progress: OnProgress
) -> "CalibrationSet":
    """Draw what the network is fed: rendered scenes of the simulator's tasks, or texts."""
    count, held_out, seed = request.count, request.held_out, request.seed
    if backbone.reads == "text":
        from calibration.texts import draw_texts

        put_calibration(run, draw_texts(count, held_out, seed, backbone.camera), on_progress)
        return load_calibration(run)
    tasks = chosen_tasks(None)
    drawn = CalibrationRequest(tasks=tasks, count=count, held_out=held_out, seed=seed)
    return calibrate(run, drawn, on_progress)


def _by_library(
    bed: _Bed,
    request: "BaselineRequest",
    environment: "BaselineEnvironment",
    on_progress: OnProgress,
) -> tuple[WeightsRow, Change]:
    from qvla_export.baselines.applied import baseline_applied
    from qvla_export.baselines.results import baseline_paths

    baseline = libraries.quantize(
        bed.run, request, bed.policy, bed.source, environment, on_progress
    )
    change = bed.judge(baseline_applied(bed.policy, baseline))
    path = baseline_paths(bed.run.root, request.setting).baseline
    took = cpu_s(bed.run, path)
    return _row(request.bits, request.method, baseline.weight_bytes, change, took), change


def _by_rounding(bed: _Bed, bits: int, on_progress: OnProgress) -> tuple[WeightsRow, Change]:
    setting = parse_setting(f"w{bits}-rtn", bed.target)
    planned = plan(bed.run, setting, bed.target, bed.policy.digest, on_progress=on_progress)
    assert planned is not None
    return _judged_plan(bed, RTN, setting, planned, bits)


def _by_us(
    bed: _Bed, bits: int, nbytes: int, tune_codes: bool, on_progress: OnProgress
) -> tuple[WeightsRow, Change]:
    setting = parse_setting(f"w{bits}", bed.target)
    measured = load_sensitivities(bed.run, bed.policy.digest)
    overrides = PlanOverrides("bytes", nbytes)
    within = PlanRequest.for_setting(setting, measured, bed.target, overrides)
    options = PlanOptions(request=within, tune_codes=tune_codes)
    plan(bed.run, setting, bed.target, bed.policy.digest, options, on_progress)
    coded = round_setting(bed.run, setting, bed.policy, on_progress=on_progress)
    assert coded is not None
    return _judged_plan(bed, OURS, setting, coded, bits)


def _judged_plan(
    bed: _Bed, method: str, setting: Setting, planned: "BitPlan", bits: int
) -> tuple[WeightsRow, Change]:
    from qvla_export.policies.layers import fake_quantized

    change = bed.judge(fake_quantized(bed.policy, planned))
    paths = (bed.run.plan(setting), bed.run.rounding(setting))
    took = sum(cpu_s(bed.run, path) or 0.0 for path in paths)
    return _row(bits, method, planned.weight_bytes, change, took), change


def _row(bits: int, method: str, nbytes: int, change: Change, took: float | None) -> WeightsRow:
    nll = None if change.surprise is None else float(change.surprise.mean())
    error = float(np.sqrt(np.square(change.relative).mean()))
    return WeightsRow(bits, method, nbytes, error, float(change.cosine.mean()), nll, took)


def _ratio(ours: Change, other: Change, calibration: "CalibrationSet") -> ErrorRatio:
    """Compare observation by observation; those of one episode, or topic, are not independent."""
    from calibration.calibration_set import FRAMES_PER_EPISODE

    together = int(calibration.source.get("frames_per_episode", FRAMES_PER_EPISODE))
    logs = np.log(ours.relative) - np.log(other.relative)
    clusters: Sequence[int] = [number // together for number in range(len(logs))]
    mean = mean_difference(logs.tolist(), clusters)
    return ErrorRatio(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high))

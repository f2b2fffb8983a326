"""The step that compares what each part of the quantizer does to held-out actions."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.allocation.setting import parse_setting
from qvla_export.pipeline.calibrate import load_calibration
from qvla_export.pipeline.moments import moments
from qvla_export.pipeline.plan import load_sensitivities
from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.quantizer.quantize import QuantizerSpec, compensated_spec, spec_for
from qvla_export.shared.artifacts import versions, write_json

if TYPE_CHECKING:
    from qvla_export.allocation.plan_request import PlanRequest
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.moments import Moments
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.sensitivity.sensitivities import Sensitivities
    from qvla_export.shared.observation import Observation
    from qvla_export.shared.target import Target

# Observations that run together.
_BATCH = 16


@dataclass(frozen=True)
class QuantizerScore:
    """What one quantizer does to the actions at one size."""

    # Of the plan, as the setting's name has them: "2.5".
    mean_bits: str
    quantizer: str
    # Bytes of the plan over those of float16.
    share_of_float16: float
    # Root mean square difference from the float policy's actions, normalized (the range is 2).
    rms: float
    # To make the codes; wall-clock.
    seconds: float


@dataclass(frozen=True)
class QuantizerComparison:
    """Quantizers side by side, at several sizes."""

    sensitivities_digest: str
    moments_digest: str
    rows: tuple[QuantizerScore, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values, with the versions that made it."""
        return {**asdict(self), "versions": versions()}

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        write_json(path, self.to_json())


def compare_quantizers(
    run: RunFolder,
    policy: "Policy",
    target: "Target",
    mean_bits: Sequence[str],
    on_progress: OnProgress = ignore,
) -> QuantizerComparison:
    """Measure what each part of the quantizer does to held-out actions, at several sizes.

    Plans are those of the sensitivities; with zero points or scales of two levels they are made
    anew for the same bytes.

    Args:
        run: has a calibration set and sensitivities.
        policy: the float policy they were measured on.
        target: whose containers store the codes.
        mean_bits: of the plans, such as "4" and "2.5".
        on_progress: hears of every quantizer.

    Raises:
        QvlaError: the run lacks what is needed, or no plan has such mean bits.
    """
    from qvla_export.allocation.plan_request import PlanRequest

    measured = load_sensitivities(run)
    fed = moments(run, policy)
    held_out = load_calibration(run).held_out
    plans = {
        text: equal_plans(
            PlanRequest.for_setting(parse_setting(f"w{text}", target), measured, target),
            measured,
            target,
        )
        for text in mean_bits
    }
    tell, total = bar(on_progress, "quantizers"), sum(map(len, plans.values()))
    rows: list[QuantizerScore] = []
    for text, of_size in plans.items():
        for row in _scores(policy, of_size, fed, held_out):
            rows.append(replace(row, mean_bits=text))
            tell(len(rows), total)
    return QuantizerComparison(measured.digest, fed.digest, tuple(rows))


def variants(target: "Target") -> dict[str, QuantizerSpec]:
    """Return quantizers that differ in one part, and the whole."""
    nearest, whole = spec_for(target), compensated_spec(target)
    inputs = replace(nearest, weighted_scales=True, compensation="inputs")
    stored = {}
    if "two-level scales" not in target.refusals:
        leveled = target.with_two_level_scales()
        # Expanded codes take 8 bits, so that no plan has as many bytes.
        if not any(container.is_expanded for container in leveled.containers.values()):
            stored["two-level scales"] = leveled
    if "zero points" not in target.refusals:
        stored["zero points"] = target.with_zero_points()
    others: dict[str, QuantizerSpec] = {}
    for words, other in stored.items():
        others[f"nearest, {words}"] = spec_for(other)
        others[f"inputs and channels, {words}"] = compensated_spec(other)
    return {
        "nearest": nearest,
        "weighted scales": replace(nearest, weighted_scales=True),
        "inputs": inputs,
        "inputs and channels": whole,
        **others,
    }


def equal_plans(
    request: "PlanRequest", measured: "Sensitivities", target: "Target"
) -> "dict[str, BitPlan]":
    """Return a plan for each quantizer, none of more bytes than that of the first."""
    plans: dict[str, BitPlan] = {}
    for name, spec in variants(target).items():
        plans[name] = request.allocate(replace(measured, quantizer=spec), target, None)
        if len(plans) == 1:
            capped = replace(request.budget, max_stored_ratio=plans[name].ratio)
            request = replace(request, budget=capped)
    return plans


def _scores(
    policy: "Policy",
    plans: "Mapping[str, BitPlan]",
    fed: "Moments",
    observations: "Sequence[Observation]",
) -> Iterator[QuantizerScore]:
    from qvla_export.policies.layers import fake_quantized
    from qvla_export.quantizer.round_plan import round_plan

    exact = _actions(policy, observations)
    for name, plan in plans.items():
        started = time.perf_counter()
        coded = round_plan(policy, plan, fed) if plan.quantizer.needs_moments else plan
        seconds = time.perf_counter() - started
        with fake_quantized(policy, coded):
            difference = _actions(policy, observations) - exact
        rms = float(np.sqrt(np.square(difference).mean()))
        yield QuantizerScore("", name, plan.ratio, rms, seconds)


def _actions(policy: "Policy", observations: "Sequence[Observation]") -> NDArray[np.float32]:
    """Return normalized actions.  float32 [observations, horizon, dim]"""
    chunks = [observations[i : i + _BATCH] for i in range(0, len(observations), _BATCH)]
    return np.concatenate([policy.greedy_actions(policy.batch(c)).numpy() for c in chunks])

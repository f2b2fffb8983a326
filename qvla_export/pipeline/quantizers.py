"""The comparison of what each part of the quantizer does to held-out actions."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.quantize import QuantizerSpec, compensated_spec, spec_for

if TYPE_CHECKING:
    from qvla_export.allocation.plan_request import PlanRequest
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.moments import Moments
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.sensitivity.sensitivities import Sensitivities
    from qvla_export.shared.observation import Observation
    from qvla_export.shared.target import Target


def variants(target: "Target") -> dict[str, QuantizerSpec]:
    """Return quantizers that differ in one part, and the whole."""
    nearest, whole = spec_for(target), compensated_spec(target)
    inputs = replace(nearest, weighted_scales=True, compensation="inputs")
    pointed = {}
    if "zero points" not in target.refusals:
        stored = target.with_zero_points()
        pointed = {
            "nearest, zero points": spec_for(stored),
            "inputs and channels, bias, zero points": compensated_spec(stored),
        }
    return {
        "nearest": nearest,
        "bias correction": replace(nearest, bias_correction=True),
        "weighted scales": replace(nearest, weighted_scales=True),
        "inputs": inputs,
        "inputs, bias": replace(inputs, bias_correction=True),
        "inputs and channels": replace(whole, bias_correction=False),
        "inputs and channels, bias": whole,
        **pointed,
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


def compared(
    policy: "Policy",
    plans: "Mapping[str, BitPlan]",
    found: "Moments",
    observations: "tuple[Observation, ...]",
) -> Iterator[dict[str, Any]]:
    """Yield what each quantizer does to the actions: RMS, normalized, and the time it takes."""
    from qvla_export.policies.layers import fake_quantized
    from qvla_export.quantizer.round_plan import round_plan

    exact = _actions(policy, observations)
    for name, plan in plans.items():
        started = time.perf_counter()
        tried = round_plan(policy, plan, found) if plan.quantizer.needs_moments else plan
        seconds = time.perf_counter() - started
        with fake_quantized(policy, tried):
            moved = _actions(policy, observations) - exact
        rms = float(np.sqrt(np.square(moved).mean()))
        share = plan.ratio
        yield {"quantizer": name, "share_of_float16": share, "rms": rms, "seconds": seconds}


def _actions(policy: "Policy", observations: "tuple[Observation, ...]") -> NDArray[np.float32]:
    size = 16
    chunks = [observations[i : i + size] for i in range(0, len(observations), size)]
    return np.concatenate([policy.greedy_actions(policy.batch(c)).numpy() for c in chunks])

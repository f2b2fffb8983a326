"""What torch computes for held-out observations: the actions that every engine is held against."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.policies.base import Policy, PolicyPart
from qvla_export.policies.layers import (
    fake_quantized,
    planned_rows,
    rounded_inputs,
    traced_layers,
)
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import as_rows
from qvla_export.shared.bundle import Golden
from qvla_export.shared.observation import Observation

_Feeds = Mapping[str, NDArray[Any]]


def golden_actions(
    policy: Policy, plan: BitPlan | None, observations: Sequence[Observation]
) -> Golden:
    """Return model inputs of observations with torch's actions, quantized and full precision."""
    full_precision = _actions(policy, observations)
    reference = full_precision
    if plan is not None:
        with fake_quantized(policy, plan):
            reference = _actions(policy, observations)
    return Golden(_feeds(policy, observations), reference, full_precision)


def golden_actions_in_parts(
    policy: Policy,
    plan: BitPlan | None,
    observations: Sequence[Observation],
    parts: Sequence[PolicyPart],
    weights: Mapping[str, Sequence[str]],
) -> Golden:
    """Return the same as `golden_actions`, holding one part's weights at a time.

    Args:
        policy: may have left its weights on disk.
        plan: None for the float policy.
        observations: the held-out ones.
        parts: of the policy, in order.
        weights: part name -> parameters and buffers it reads.
    """
    feeds = _feeds(policy, observations)
    full_precision = _actions_in_parts(policy, None, feeds, parts, weights)
    reference = full_precision
    if plan is not None:
        reference = _actions_in_parts(policy, plan, feeds, parts, weights)
    return Golden(feeds, reference, full_precision)


def _actions_in_parts(
    policy: Policy,
    plan: BitPlan | None,
    feeds: Sequence[_Feeds],
    parts: Sequence[PolicyPart],
    weights: Mapping[str, Sequence[str]],
) -> NDArray[np.float32]:
    runs = [{name: torch.from_numpy(value) for name, value in item.items()} for item in feeds]
    for part in parts:
        _run_part(policy, part, weights[part.name], plan, runs)
    return np.concatenate([run["actions"].numpy() for run in runs])


@torch.no_grad()
def _run_part(
    policy: Policy,
    part: PolicyPart,
    weights: Sequence[str],
    plan: BitPlan | None,
    runs: Sequence[dict[str, Tensor]],
) -> None:
    """Add a part's output to the values of every observation."""
    parameters = {}
    for name in weights:
        values = policy.read_weight(name)
        layer = name.removesuffix(".weight")
        if plan is not None and layer in plan.widths:
            rows = planned_rows(layer, as_rows(values), plan)
            values = rows.reshape(values.shape)
        parameters[f"module.{name}"] = torch.from_numpy(np.ascontiguousarray(values))
    activations = None if plan is None else plan.activations
    couplings = {} if plan is None else plan.couplings
    removed = {name: coupling.constant_units for name, coupling in couplings.items()}
    with rounded_inputs(traced_layers(policy), activations, removed):
        for run in runs:
            inputs = tuple(run[name] for name in part.inputs)
            run[part.output] = torch.func.functional_call(part.module, parameters, inputs)


@torch.no_grad()
def _actions(policy: Policy, observations: Sequence[Observation]) -> NDArray[np.float32]:
    """Normalized actions one observation at a time, as the engine computes them."""
    chunks = [policy.greedy_actions(policy.batch([item])).numpy() for item in observations]
    return np.concatenate(chunks)


def _feeds(policy: Policy, observations: Sequence[Observation]) -> tuple[_Feeds, ...]:
    return tuple(policy.processor.feeds(observation) for observation in observations)

"""What a width costs on the quantized policy: the action error's slope along each change of width.

At a plan the action error is E||e||^2 with e = A_quantized - A, and giving channel c another width
moves the action by d, so that the error changes by E[2 e . d] + E||d||^2. The first part is exact
to first order for all channels and widths at once: the gradient of the action error with respect
to the weights, times the change of the weights. The second part, of independent channels, is known
from the sensitivities. It bounds how far one step goes: `caution` times as much is charged.

Everything is in memory at once: float weights, weights in place and gradients of all layers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.coupling import find_couplings
from qvla_export.layers import fake_quantized, planned_rows, traced_layers, weight_rows
from qvla_export.observation import Observation
from qvla_export.plan import BitPlan
from qvla_export.policies.base import Policy
from qvla_export.sensitivity import Sensitivities


def error_slopes(
    policy: Policy,
    batches: Sequence[Sequence[Observation]],
    reference: Sequence[Tensor],
    plan: BitPlan,
) -> dict[str, NDArray[np.float64]]:
    """Return the first-order change of the action error for each channel and width.

    Args:
        policy: float32.
        batches: of observations.
        reference: normalized actions of the float policy on each batch.
        plan: where the action error is derived.

    Returns:
        Layer name -> E[2 e . d], zero at the plan's own width.  float64 [widths, channels]
    """
    layers = traced_layers(policy)
    originals = {name: weight_rows(layer) for name, layer in layers.items()}
    with fake_quantized(policy, plan):
        now = {name: weight_rows(layer) for name, layer in layers.items()}
        gradients = _error_gradients(policy, batches, reference, list(layers.items()))
    couplings = {c.consumer: c for c in find_couplings(plan.widths, plan.weights_per_channel)}
    slopes = {}
    for name, rows in originals.items():
        slope = np.empty((len(widths_of(plan)), len(rows)))
        for i, bits in enumerate(widths_of(plan)):
            # The couplings stay: the order of inputs does not depend on the consumer's own widths.
            uniform = replace(plan, widths={**plan.widths, name: np.full(len(rows), bits, np.int8)})
            change = planned_rows(name, rows, uniform, couplings) - now[name]
            slope[i] = np.einsum("ci,ci->c", change, gradients[name], dtype=np.float64)
        slopes[name] = slope
    return slopes


def _error_gradients(
    policy: Policy,
    batches: Sequence[Sequence[Observation]],
    reference: Sequence[Tensor],
    layers: Sequence[tuple[str, Any]],
) -> dict[str, NDArray[np.float32]]:
    """Gradient of E||e||^2 with respect to the weights in place.  float32 [channels, inputs]"""
    weights = [layer.weight for _, layer in layers]
    sums = [torch.zeros_like(weight) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for batch, expected in zip(batches, reference, strict=True):
                moved = policy.normalized_actions(policy.batch(batch)) - expected
                found = torch.autograd.grad(moved.square().sum(), weights)
                for total, gradient in zip(sums, found, strict=True):
                    total += gradient
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    count = sum(map(len, batches))
    return {
        name: (total / count).reshape(len(total), -1).cpu().numpy()
        for (name, _), total in zip(layers, sums, strict=True)
    }


def changes_at(
    measured: Sensitivities, plan: BitPlan, slopes: dict[str, NDArray[np.float64]], caution: float
) -> Sensitivities:
    """Return changes of the error in the place of sensitivities, each channel's least one zero.

    Args:
        measured: the sensitivities.
        plan: what changes.
        slopes: see `error_slopes`.
        caution: how many times the second part is charged.
    """
    values = {}
    widths = widths_of(plan)
    for name, slope in slopes.items():
        alone = np.stack([measured.at(name, bits).astype(np.float64) for bits in widths])
        here = np.searchsorted(widths, plan.widths[name])
        channels = np.arange(len(here))
        # Rounding errors of two widths are independent of each other.
        further = alone + alone[here, channels]
        further[here, channels] = 0
        changes = slope + caution * further
        values[name] = (changes - changes.min(axis=0)).astype(np.float32)
    return replace(measured, values=values, widths=widths, method="change at a plan")


def widths_of(plan: BitPlan) -> tuple[int, ...]:
    """Widths that a channel may get: all the quantizer and the target have."""
    return tuple(sorted({0, 16, *plan.quantizer.rules} & {0, *plan.containers}))

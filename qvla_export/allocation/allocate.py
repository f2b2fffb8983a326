"""Sensitivities and limits -> a bit plan. numpy only.

`allocation.methods` names the methods; `allocation.limits` holds what single
channels' costs do not add up to.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.allocation.budget import Budget, BudgetKind, LatencyLimit
from qvla_export.allocation.demotions import DemotionTable, Levels, PruningRule, demotion_table
from qvla_export.allocation.hull import error_bound
from qvla_export.allocation.limits import within_bytes, within_latency
from qvla_export.allocation.methods import METHODS, AllocationMethod, Allocator, find_allocator
from qvla_export.allocation.whole_layers import units_of
from qvla_export.quantizer.packed_storage import stored_on
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.plan_bytes import PackedForm, PlanBytes
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WIDTHS, Target

__all__ = [
    "METHODS",
    "AllocationMethod",
    "Allocator",
    "Budget",
    "BudgetKind",
    "LatencyLimit",
    "PruningRule",
    "allocate_bits",
    "find_allocator",
    "least_error",
]


def allocate_bits(
    sensitivities: Sensitivities,
    budget: Budget,
    target: Target,
    widths: Sequence[int] = WIDTHS,
    pruning: PruningRule | None = None,
    latency: LatencyLimit | None = None,
    method: AllocationMethod | Allocator = "hull",
) -> BitPlan:
    """Choose the channels' widths so that the budget is met.

    What a step saves (eq. 8) is counted in the budget's own unit. A limit on the stored ratio that
    the budget leaves unmet is then met by further steps, ordered by error per stored bit, and a
    limit on the latency by further ones, ordered by error per predicted millisecond.

    Args:
        sensitivities: of the policy.
        budget: the limits.
        target: what the bytes are counted on; widths it has no container for are not used.
        widths: allowed widths; every channel starts at the widest.
        pruning: limits on the step to 0 bits; None for none.
        latency: a limit on the predicted latency; None for none.
        method: name of a method, see `qvla_export.allocation.methods`, or one with parameters.

    Raises:
        QvlaError: a limit cannot be met, an unknown width or method.
    """
    allocator = find_allocator(method) if isinstance(method, str) else method
    target = stored_on(target, sensitivities.quantizer)
    if latency is not None and allocator.name == "gates":
        raise QvlaError(
            "fixed gates leave a latency limit nothing to choose; take another method, such as hull"
        )
    table = _table(sensitivities, budget, target, widths, pruning)
    if allocator.grain != "channel":
        table = table.by_layers(units_of(table.layers, allocator.grain))

    compensated = sensitivities.quantizer.needs_moments
    form = PackedForm(target.containers, budget.rounded_inputs, compensated)
    count = PlanBytes(sensitivities.weights_per_channel, form)

    def weight_bytes(levels: Levels) -> int:
        return count.of(table.widths_of(levels))

    levels = _within_budget(table, budget, allocator, weight_bytes)
    if latency is not None:
        levels = within_latency(table, levels, latency)
    limits = str(budget) if latency is None else f"{budget}, {latency}"
    provenance = _provenance(allocator, budget, table)
    return _plan(sensitivities, limits, target, table, levels, provenance)


def _within_budget(
    table: DemotionTable,
    budget: Budget,
    allocator: Allocator,
    weight_bytes: Callable[[Levels], int],
) -> Levels:
    step, levels = allocator.step, np.zeros(table.units, np.int8)
    cost, limit = _cost(budget, table)
    what = f"the budget of {budget}"
    if budget.kind == "bytes":
        levels = within_bytes(table, levels, step, limit, what, weight_bytes)
    else:
        levels = step(table, levels, cost, limit, what)
    if budget.max_stored_ratio is not None:
        cap = budget.max_stored_ratio * table.float16_bits
        what = f"the limit in {budget}"
        levels = within_bytes(table, levels, step, cap, what, weight_bytes)
    return levels


def least_error(
    sensitivities: Sensitivities,
    budget: Budget,
    target: Target,
    widths: Sequence[int] = WIDTHS,
    pruning: PruningRule | None = None,
) -> float:
    """Return an error that no plan of these limits goes below; compare `expected_error` with it.

    It is the optimum of the linear relaxation for the budget itself; a stored ratio, a latency
    limit and caps on pruning are left out, which can only lower it. Bytes are those of the channels
    themselves: what restores their order comes on top, so a plan within a budget in bytes is close
    to the bound of what its order leaves; where hidden units leave an MLP, it may have less.

    Args: see `allocate_bits`.

    Returns:
        Sum of sensitivities; infinite where no plan is within the budget.
    """
    target = stored_on(target, sensitivities.quantizer)
    table = _table(sensitivities, budget, target, widths, pruning)
    cost, limit = _cost(budget, table)
    return error_bound(table, cost, limit)


def _table(
    sensitivities: Sensitivities,
    budget: Budget,
    target: Target,
    widths: Sequence[int],
    pruning: PruningRule | None,
) -> DemotionTable:
    allowed = _allowed_widths(widths, sensitivities, budget, target)
    return demotion_table(sensitivities, target, allowed, pruning or PruningRule())


def _allowed_widths(
    widths: Sequence[int], sensitivities: Sensitivities, budget: Budget, target: Target
) -> tuple[int, ...]:
    """Allowed widths from high to low that the target has and that were measured."""
    if not set(widths) <= set(WIDTHS) or not max(widths, default=0):
        raise QvlaError(
            f"allowed widths must be among {WIDTHS} and one of them above 0, got {list(widths)}"
        )
    available = [b for b in sorted(set(widths), reverse=True) if b == 0 or b in target.containers]
    if not max(available, default=0):
        raise QvlaError(
            f"target {target.name!r} stores {sorted(target.containers)} bits, none of the allowed "
            f"{sorted(widths)}; allow one of those"
        )
    for bits in available:
        if bits != 16 and bits not in sensitivities.widths:
            raise QvlaError(
                f"no sensitivities at {bits} bits, only at {sensitivities.widths}; "
                "measure them or leave the width out"
            )
    nominal = budget.kind != "bytes"
    if nominal and budget.max_stored_ratio is None:
        return tuple(available)
    # Where bytes count, a width stored like a wider one (2 bits on TensorRT) only adds error;
    # codes that are stored expanded are asked for by their nominal bits.
    kept = [available[0]]
    for bits in available[1:]:
        # Pruned channels are in no container.
        container = target.containers.get(bits)
        fewer = container is None or container.bits < target.containers[kept[-1]].bits
        if fewer or (nominal and container is not None and container.is_expanded):
            kept.append(bits)
    return tuple(kept)


def _cost(budget: Budget, table: DemotionTable) -> tuple[NDArray[np.int64], float]:
    """Bits of each unit at each width in the budget's kind, int64 [widths, units]; the sum they
    may have."""
    if budget.kind == "bytes":
        return table.stored_bits(), 8 * budget.value
    if budget.kind == "bits per weight":
        return table.weight_bits(), budget.value * table.float16_bits / 16
    return table.nominal_bits(), budget.value * table.channels


def _provenance(allocator: Allocator, budget: Budget, table: DemotionTable) -> dict[str, Any]:
    """What a plan says about how it was made."""
    return {
        "method": allocator.name,
        **(allocator.parameters or {}),
        "widths": sorted(table.widths),
        "budget": budget.to_json(),
        "pruning": table.pruning.to_json(),
    }


def _plan(
    sensitivities: Sensitivities,
    budget: str,
    target: Target,
    table: DemotionTable,
    levels: Levels,
    provenance: dict[str, Any],
) -> BitPlan:
    return BitPlan(
        widths=table.widths_of(levels),
        weights_per_channel=dict(sensitivities.weights_per_channel),
        target=target.name,
        containers=dict(target.containers),
        quantizer=sensitivities.quantizer,
        budget=budget,
        allocation=provenance,
        policy_digest=sensitivities.policy_digest,
        sensitivities_digest=sensitivities.digest,
        calibration_digest=sensitivities.calibration_digest,
        expected_error=table.error_of(levels),
    )

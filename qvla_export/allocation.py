"""Sensitivities and limits -> a bit plan. numpy only.

`qvla_export.greedy` is Algorithm 1 of the paper, `qvla_export.hull` the allocation with a bound.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qvla_export.demotions import DemotionTable, Levels, PruningRule, demotion_table
from qvla_export.errors import QvlaError
from qvla_export.greedy import demote_greedily
from qvla_export.hull import HullJumps, demote, demote_along_hull, error_bound
from qvla_export.latency_model import LatencyModel, Widths
from qvla_export.plan import BitPlan
from qvla_export.sensitivity import Sensitivities
from qvla_export.target import WIDTHS, ActivationSupport, Target

BudgetKind = Literal["bits per channel", "bits per weight", "bytes"]
# "greedy": Algorithm 1 as printed. "hull": along lower convex hulls.
AllocationMethod = Literal["greedy", "hull"]
# Channels below which filled-up bytes are removed step by step: the fewest steps are found then.
_ONE_BY_ONE = 10_000
__all__ = [
    "AllocationMethod",
    "Budget",
    "LatencyLimit",
    "PruningRule",
    "allocate_bits",
    "least_error",
]


@dataclass(frozen=True)
class Budget:
    """How much a plan may cost.

    Budget("bits per channel", 4.0)                          # the paper's average
    Budget("bits per channel", 4.0, max_stored_ratio=0.29)   # and at most 29 % of float16's bytes
    Budget("bytes", 3_000_000)                               # stored on the target, with scales
    """

    kind: BudgetKind
    # Mean bits, or bytes.
    value: float
    # Largest stored share of the float16 bytes, scales included; None for no such limit.
    max_stored_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(BudgetKind):
            raise QvlaError(f"a budget is one of {get_args(BudgetKind)}, got {self.kind!r}")
        if not np.isfinite(self.value) or self.value < 0:
            raise QvlaError(f"a budget must be a number >= 0, got {self.value}")
        if self.max_stored_ratio is not None and not self.max_stored_ratio >= 0:
            raise QvlaError(f"max_stored_ratio must be >= 0, got {self.max_stored_ratio}")

    def __str__(self) -> str:
        text = f"{self.value:g} {'bytes' if self.kind == 'bytes' else f'mean {self.kind}'}"
        if self.max_stored_ratio is None:
            return text
        return f"{text}, stored at most {self.max_stored_ratio:g} of float16"


@dataclass(frozen=True)
class LatencyLimit:
    """Predicted milliseconds of one action that a plan must stay within."""

    max_ms: float
    # Predicts the very policy the plan is for.
    model: LatencyModel
    activations: ActivationSupport = "none"

    def __post_init__(self) -> None:
        if not self.max_ms > 0:
            raise QvlaError(f"a latency limit must be above 0 ms, got {self.max_ms}")

    def used_by(self, widths: Widths) -> float:
        """Return the share of the limit that widths are predicted to take; 1 just keeps it."""
        return self.model.predict(widths, self.activations).total_ms / self.max_ms

    def __str__(self) -> str:
        return (
            f"at most {self.max_ms:g} ms predicted on {self.model.target.name} "
            f"in mode {self.model.mode.name}"
        )


def allocate_bits(
    sensitivities: Sensitivities,
    budget: Budget,
    target: Target,
    widths: Sequence[int] = WIDTHS,
    pruning: PruningRule | None = None,
    latency: LatencyLimit | None = None,
    method: AllocationMethod = "greedy",
) -> BitPlan:
    """Demote the channel that adds least error per saved bit until the budget is met.

    What a step saves (eq. 8) is counted in the budget's own unit. A limit on the stored ratio that
    the budget leaves unmet is then met by further steps, ordered by error per stored bit, and a
    limit on the latency by further ones, ordered by error per predicted millisecond.

    Args:
        sensitivities: of the policy.
        budget: the limits.
        target: what the bytes are counted on; widths it has no container for are not used.
        widths: allowed widths; 16 must be among them, every channel starts there.
        pruning: limits on the step to 0 bits; None for none.
        latency: a limit on the predicted latency; None for none.
        method: "greedy" is Algorithm 1.

    Raises:
        QvlaError: a limit cannot be met, an unknown width or method.
    """
    if method not in get_args(AllocationMethod):
        raise QvlaError(f"the method must be one of {get_args(AllocationMethod)}, got {method!r}")
    table = _table(sensitivities, budget, target, widths, pruning)
    step = demote_greedily if method == "greedy" else demote_along_hull
    levels = np.zeros(table.channels, np.int8)
    wanted = str(budget) if latency is None else f"{budget}, {latency}"

    def planned(at: Levels) -> BitPlan:
        return _plan(sensitivities, wanted, target, table, at)

    cost, limit = _cost(budget, table)
    if budget.kind == "bytes":
        levels = _within_bytes(table, levels, step, limit, f"the budget of {budget}", planned)
    else:
        levels = step(table, levels, cost, limit, f"the budget of {budget}")
    if budget.max_stored_ratio is not None:
        cap = budget.max_stored_ratio * table.float16_bits
        levels = _within_bytes(table, levels, step, cap, f"the limit in {budget}", planned)
    if latency is not None:
        levels = _within_latency(table, levels, latency)
    return planned(levels)


def least_error(
    sensitivities: Sensitivities,
    budget: Budget,
    target: Target,
    widths: Sequence[int] = WIDTHS,
    pruning: PruningRule | None = None,
) -> float:
    """Return an error that no plan of these limits goes below; compare `expected_error` with it.

    It is the optimum of the linear relaxation for the budget itself; a stored ratio, a latency
    limit and caps on pruning are left out, which can only lower it.

    Args: as of `allocate_bits`.

    Returns:
        Sum of sensitivities; infinite where no plan is within the budget.
    """
    table = _table(sensitivities, budget, target, widths, pruning)
    return error_bound(table, *_cost(budget, table))


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
    if 16 not in widths or not set(widths) <= set(WIDTHS):
        raise QvlaError(f"allowed widths must be among {WIDTHS} and contain 16, got {list(widths)}")
    available = [b for b in sorted(set(widths), reverse=True) if b == 0 or b in target.containers]
    for bits in available:
        if bits != 16 and bits not in sensitivities.widths:
            raise QvlaError(
                f"no sensitivities at {bits} bits, only at {sensitivities.widths}; "
                "measure them or leave the width out"
            )
    if budget.kind != "bytes" and budget.max_stored_ratio is None:
        return tuple(available)
    # Where bytes count, a width stored like a wider one (2 bits on TensorRT) only adds error.
    kept = [available[0]]
    for bits in available[1:]:
        if bits == 0 or target.containers[bits].bits < target.containers[kept[-1]].bits:
            kept.append(bits)
    return tuple(kept)


def _cost(budget: Budget, table: DemotionTable) -> tuple[NDArray[np.int64], float]:
    """Bits of each channel at each width in the budget's unit, int64 [widths, channels]; the sum
    they may have."""
    if budget.kind == "bytes":
        return table.stored_bits(), 8 * budget.value
    if budget.kind == "bits per weight":
        return table.weight_bits(), budget.value * table.float16_bits / 16
    return table.nominal_bits(), budget.value * table.channels


def _within_bytes(
    table: DemotionTable,
    levels: Levels,
    step: Callable[[DemotionTable, Levels, NDArray[np.int64], float, str], Levels],
    limit: float,
    what: str,
    planned: Callable[[Levels], BitPlan],
) -> Levels:
    """Take steps until the plan's own bytes are within the limit in bits.

    Columns and groups that are filled up are in no channel's own bits: where they exceed the
    limit, further steps are taken, one by one where that is quick.
    """
    stored, allowed = table.stored_bits(), limit
    while True:
        levels = step(table, levels, stored, allowed, what)
        excess = 8 * planned(levels).weight_bytes - limit
        if excess <= 0:
            return levels
        spent = np.take_along_axis(stored, levels[None].astype(np.int64), 0).sum()
        allowed = float(spent) - (1.0 if table.channels < _ONE_BY_ONE else max(excess, 1.0))


def _within_latency(table: DemotionTable, levels: Levels, latency: LatencyLimit) -> Levels:
    """Take further hull jumps, least error per predicted millisecond first.

    The milliseconds of single channels only order the jumps; how many are needed is found by
    bisection with the whole prediction, launches and pruned inputs included.
    """

    def predicted(at: Levels) -> float:
        return latency.model.predict(table.widths_of(at), latency.activations).total_ms

    def enough(jumps: HullJumps) -> int:
        low, high = -1, len(jumps.channel)
        if predicted(jumps.taken(levels, high)) > latency.max_ms:
            return high + 1
        while high - low > 1:
            middle = (low + high) // 2
            if predicted(jumps.taken(levels, middle)) <= latency.max_ms:
                high = middle
            else:
                low = middle
        return high

    def refusal(jumps: HullJumps) -> QvlaError:
        least = predicted(jumps.taken(levels, len(jumps.channel)))
        return QvlaError(
            f"{latency} cannot be met: the least that widths {table.widths} and the pruning rule "
            f"reach is {least:.2f} ms; raise the limit, allow pruning or 8-bit activations"
        )

    if predicted(levels) <= latency.max_ms:
        return levels
    costs = [
        latency.model.channel_ms(name, table.widths, latency.activations) for name in table.layers
    ]
    return demote(table, levels, np.stack(costs, axis=1)[:, table.layer], enough, refusal)


def _plan(
    sensitivities: Sensitivities, budget: str, target: Target, table: DemotionTable, levels: Levels
) -> BitPlan:
    return BitPlan(
        widths=table.widths_of(levels),
        weights_per_channel=dict(sensitivities.weights_per_channel),
        target=target.name,
        containers=dict(target.containers),
        quantizer=sensitivities.quantizer,
        budget=budget,
        policy_digest=sensitivities.policy_digest,
        sensitivities_digest=sensitivities.digest,
        calibration_digest=sensitivities.calibration_digest,
        expected_error=table.error_of(levels),
    )

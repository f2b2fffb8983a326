"""Limits that single channels' costs do not add up to: a plan's own bytes, its latency. numpy only.

Steps are ordered by the channels' own costs; how many are needed is judged on the whole plan.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qvla_export.allocation.budget import LatencyLimit
from qvla_export.allocation.demotions import DemotionTable, Levels
from qvla_export.allocation.hull import HullJumps, demote
from qvla_export.shared.errors import QvlaError

# (table, levels, cost, limit, what) -> levels; see `qvla_export.allocation.methods`.
Step = Callable[[DemotionTable, Levels, NDArray[np.int64], float, str], Levels]
# Units below which the last steps are taken one by one, once the plan is within `_SLACK`.
_ONE_BY_ONE = 10_000
# Tries to use up what coupled layers save.
_FILLINGS = 12
# Share of the limit that may stay unused.
_SLACK = 1e-3


def within_bytes(
    table: DemotionTable,
    levels: Levels,
    step: Step,
    limit: float,
    what: str,
    weight_bytes: Callable[[Levels], int],
) -> Levels:
    """Take steps until the plan's own bytes are within the limit.

    Columns and groups that are filled up, and what restores the order of channels, are in no
    channel's own bits: where they exceed the limit, further steps are taken, the last ones one by
    one where that is quick.

    Args:
        table: all demotions.
        levels: where the units are.
        step: of the method.
        limit: in bits.
        what: names the limit in the error.
        weight_bytes: of the plan at some levels.
    """
    if 8 * weight_bytes(levels) <= limit:
        return levels
    stored, start, allowed = table.stored_bits(), levels, limit
    while True:
        levels = step(table, levels, stored, allowed, what)
        excess = 8 * weight_bytes(levels) - limit
        if excess <= 0:
            break
        spent = np.take_along_axis(stored, levels[None].astype(np.int64), 0).sum()
        # Half of what is too much takes few steps too many where there are too many to go singly.
        singly = table.units < _ONE_BY_ONE and excess < _SLACK * limit
        step_bits = 1.0 if singly else max(excess / 2, 1.0)
        allowed = max(float(spent) - step_bits, 0.0) if spent else -1.0
    return _use_up_slack(table, start, levels, step, limit, allowed, weight_bytes)


def _use_up_slack(
    table: DemotionTable,
    start: Levels,
    levels: Levels,
    step: Step,
    limit: float,
    allowed: float,
    weight_bytes: Callable[[Levels], int],
) -> Levels:
    """Take fewer steps where the plan stores less than its channels' own bits.

    Hidden units that leave an MLP take their consumer's inputs with them, which no channel's own
    bits say. `levels` are within the limit, with their own bits within `allowed`.
    """
    stored, too_much = table.stored_bits(), np.inf
    for _ in range(_FILLINGS):
        left = limit - 8 * weight_bytes(levels)
        if left < _SLACK * limit or too_much - allowed < _SLACK * limit:
            break
        tried = min(allowed + left, (allowed + too_much) / 2)
        found = step(table, start, stored, tried, "")
        if 8 * weight_bytes(found) <= limit:
            levels, allowed = found, tried
        else:
            too_much = tried
    return levels


def within_latency(table: DemotionTable, levels: Levels, latency: LatencyLimit) -> Levels:
    """Take further hull jumps, least error per predicted millisecond first.

    The milliseconds of single channels only order the jumps; how many are needed is found by
    bisection with the whole prediction, launches and pruned inputs included.
    """

    def latency_of(at: Levels) -> float:
        return latency.model.predict(table.widths_of(at), latency.activations).total_ms

    def enough(jumps: HullJumps) -> int:
        low, high = -1, len(jumps.channel)
        if latency_of(jumps.levels_after(levels, high)) > latency.max_ms:
            return high + 1
        while high - low > 1:
            middle = (low + high) // 2
            if latency_of(jumps.levels_after(levels, middle)) <= latency.max_ms:
                high = middle
            else:
                low = middle
        return high

    def refusal(jumps: HullJumps) -> QvlaError:
        least = latency_of(jumps.levels_after(levels, len(jumps.channel)))
        return QvlaError(
            f"{latency} cannot be met: the least that widths {table.widths} and the pruning rule "
            f"reach is {least:.2f} ms; raise the limit, allow pruning or 8-bit activations"
        )

    if latency_of(levels) <= latency.max_ms:
        return levels
    costs = [
        latency.model.channel_ms(name, table.widths, latency.activations) for name in table.layers
    ]
    return demote(table, levels, table.of_units(np.stack(costs, axis=1)), enough, refusal)

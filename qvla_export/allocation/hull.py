"""Allocation along lower convex hulls, with the bound of the linear program. numpy only.

Choosing one width a channel under a budget is a multiple-choice knapsack. Its linear relaxation
is solved by each channel's lower convex hull of (cost, error): sort the jumps between vertices of
all hulls by added error per saved cost and take them until the budget is met, the last one in
part (Sinha and Zoltners 1979). Taking the last one whole is at most one jump worse.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.allocation.algorithm1 import unreachable
from qvla_export.allocation.demotions import DemotionTable, Levels
from qvla_export.shared.errors import QvlaError

# Channels handled at a time: their arrays stay in a cache.
_CHUNK = 16384
# Slope, channel, level, saved, added of jumps.
_Part = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class HullJumps:
    """Jumps between hull vertices, cheapest first; a channel's own stay in order."""

    # int32 [jumps]
    channel: NDArray[np.int32]
    # The level a jump leads to.  int8 [jumps]
    level: NDArray[np.int8]
    # Saved cost and added error, which may be below zero.  float64 [jumps]
    savings: NDArray[np.float64]
    errors: NDArray[np.float64]

    def levels_after(self, start: Levels, count: int) -> Levels:
        """Return the levels after the first `count` jumps."""
        levels = start.copy()
        # Later jumps of a channel overwrite earlier ones.
        levels[self.channel[:count]] = self.level[:count]
        return levels


def hull_jumps(
    cost: NDArray[np.float64],
    errors: NDArray[np.float64],
    start: Levels,
    allowed: NDArray[np.bool_],
) -> HullJumps:
    """Return all jumps along the channels' lower hulls.

    Args:
        cost: of each channel at each level, any order.  float64 [levels, channels]
        errors: the same of the errors.  float64 [levels, channels]
        start: levels the channels are at.
        allowed: levels a channel may jump to.  bool [levels, channels]
    """
    parts = [
        part
        for first in range(0, len(start), _CHUNK)
        for part in _jumps_of(cost, errors, start, allowed, slice(first, first + _CHUNK))
    ]
    order = np.argsort(_join(parts, 0, np.float64), kind="stable")
    return HullJumps(
        channel=_join(parts, 1, np.int32)[order],
        level=_join(parts, 2, np.int8)[order],
        savings=_join(parts, 3, np.float64)[order],
        errors=_join(parts, 4, np.float64)[order],
    )


def _join(parts: list[_Part], field: int, dtype: type[Any]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(part[field] for part in parts)])


def _jumps_of(
    cost: NDArray[np.float64],
    errors: NDArray[np.float64],
    start: Levels,
    allowed: NDArray[np.bool_],
    chunk: slice,
) -> Iterator[_Part]:
    """Jumps of a run of channels, first ones first."""
    cost, errors, allowed = cost[:, chunk], errors[:, chunk], allowed[:, chunk]
    here = start[chunk].astype(np.int64)
    columns = np.arange(len(here))
    slopes = np.full(len(here), -np.inf)
    for _ in range(len(cost) - 1):
        slope, level = _next_vertex(cost, errors, here, allowed)
        moves = level != here
        if not moves.any():
            return
        cost, errors, allowed = cost[:, moves], errors[:, moves], allowed[:, moves]
        # Rounding must not put a channel's later jump before its earlier one.
        slopes = np.maximum(slopes[moves], slope[moves])
        columns, before, here = columns[moves], here[moves], level[moves]
        saved = _pick(cost, before) - _pick(cost, here)
        added = _pick(errors, here) - _pick(errors, before)
        channels = (columns + chunk.start).astype(np.int32)
        yield slopes, channels, here.astype(np.int8), saved, added


def _next_vertex(
    cost: NDArray[np.float64],
    errors: NDArray[np.float64],
    here: NDArray[np.int64],
    allowed: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Slope and level of the flattest way to a lower cost; the level itself where there is none."""
    cost_here, error_here = _pick(cost, here), _pick(errors, here)
    slope, level = np.full(len(here), np.inf), here.copy()
    most_saved = np.zeros(len(here))
    for target in range(len(cost)):
        saved = cost_here - cost[target]
        open_to = allowed[target] & (saved > 0)
        candidate = np.full(len(here), np.inf)
        np.divide(errors[target] - error_here, saved, out=candidate, where=open_to)
        better = (candidate < slope) | ((candidate == slope) & open_to & (saved > most_saved))
        slope[better], level[better] = candidate[better], target
        most_saved[better] = saved[better]
    return slope, level


def _pick(values: NDArray[Any], levels: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """Each channel's value at its level.  [levels, channels] -> [channels]"""
    picked: NDArray[Any] = values[levels, np.arange(len(levels))]
    return picked


def demote_along_hull(
    table: DemotionTable, levels: Levels, cost: NDArray[np.int64], limit: float, what: str
) -> Levels:
    """Take hull jumps until the cost is within the limit, and those that lower the error anyway.

    Args and errors: see `qvla_export.allocation.algorithm1.demote_greedily`.
    """
    spent = float(_pick(cost, levels).sum())

    def enough(jumps: HullJumps) -> int:
        return max(_count_to(jumps, spent - limit), int((jumps.errors < 0).sum()))

    def refusal(jumps: HullJumps) -> QvlaError:
        return unreachable(what, limit, spent - float(jumps.savings.sum()), table)

    return demote(table, levels, cost.astype(np.float64), enough, refusal)


def demote(
    table: DemotionTable,
    levels: Levels,
    cost: NDArray[np.float64],
    enough: Callable[[HullJumps], int],
    refusal: Callable[[HullJumps], QvlaError],
) -> Levels:
    """Take as many hull jumps as are enough, prunings within the rule's caps.

    Where a cap is exceeded, the channels that pruning harms least stay pruned, the others of the
    layer (or of all) may not be, and the hulls are made anew: once for each cap at most.

    Args:
        table: all demotions.
        levels: where the units are.
        cost: of each unit at each width, float64 [widths, units].
        enough: jumps -> how many to take; more than there are if all do not suffice.
        refusal: jumps -> the error for that case.
    """
    allowed = _below(table, levels)
    while True:
        jumps = hull_jumps(cost, table.errors, levels, allowed)
        count = enough(jumps)
        if count > len(jumps.channel):
            raise refusal(jumps)
        chosen = jumps.levels_after(levels, count)
        barred = _barred_by_caps(table, chosen, levels) & allowed[-1]
        if not barred.any():
            return chosen
        allowed[-1] &= ~barred


def error_bound(table: DemotionTable, cost: NDArray[np.int64], limit: float) -> float:
    """Return the linear program's error: no plan within the limit has less, whatever made it.

    The caps on pruning are left out, which can only lower it. Infinite where no plan exists.
    """
    start = np.zeros(table.units, np.int8)
    jumps = hull_jumps(cost.astype(np.float64), table.errors, start, _below(table, start))
    excess = float(cost[0].sum()) - limit
    count = _count_to(jumps, excess)
    if count > len(jumps.channel):
        return float("inf")
    count = max(count, int((jumps.errors < 0).sum()))
    error = float(table.errors[0].sum()) + float(jumps.errors[:count].sum())
    excess_savings = float(jumps.savings[:count].sum()) - excess
    if count and jumps.errors[count - 1] > 0:
        error -= float(jumps.errors[count - 1]) * excess_savings / float(jumps.savings[count - 1])
    return error


def _count_to(jumps: HullJumps, excess: float) -> int:
    """Fewest jumps that save the excess; one more than there are if all do not."""
    if excess <= 1e-6:
        return 0
    return int(np.searchsorted(np.cumsum(jumps.savings), excess - 1e-6)) + 1


def _below(table: DemotionTable, levels: Levels) -> NDArray[np.bool_]:
    """Levels that each unit may be demoted to.  bool [widths, units]"""
    allowed = np.arange(len(table.widths))[:, None] > levels
    if table.prunes:
        allowed[-1] &= table.prunable
    return allowed


def _barred_by_caps(table: DemotionTable, chosen: Levels, before: Levels) -> NDArray[np.bool_]:
    """Units that may not be pruned so that no cap is exceeded.  bool [units]"""
    barred = np.zeros(table.units, dtype=bool)
    if not table.prunes or not table.pruning.has_caps:
        return barred
    last = len(table.widths) - 1
    pruned = np.flatnonzero(chosen == last)
    # What was pruned before stays.
    harm = np.where(before[pruned] == last, -np.inf, table.errors[last, pruned])
    kept = np.zeros(table.units, dtype=bool)
    kept[pruned] = True
    if table.unit_of_layer is None:
        order = np.lexsort((harm, table.layer[pruned]))
        layer = table.layer[pruned][order]
        counts = np.bincount(layer, minlength=len(table.layers))
        rank = np.arange(len(pruned)) - np.repeat(np.cumsum(counts) - counts, counts)
        most = np.floor(table.pruning.max_share_of_layer * table.sizes)
        kept[pruned[order][rank >= most[layer]]] = False
        barred |= (counts > most)[table.layer] & ~kept
    members = table.members
    most_in_all = np.floor(table.pruning.max_share * table.channels)
    if members[kept].sum() > most_in_all:
        candidates = pruned[np.argsort(harm, kind="stable")]
        candidates = candidates[kept[candidates]]
        barred[:] = True
        barred[candidates[np.cumsum(members[candidates]) <= most_in_all]] = False
    return barred

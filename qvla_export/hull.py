"""Allocation along lower convex hulls, with the bound of the linear program. numpy only.

Choosing one width a channel under a budget is a multiple-choice knapsack. Its linear relaxation
is solved by each channel's lower convex hull of (cost, error): sort the jumps between vertices of
all hulls by added error per saved cost and take them until the budget is met, the last one in
part (Sinha and Zoltners 1979). Taking the last one whole is at most one jump worse.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.demotions import DemotionTable, Levels
from qvla_export.errors import QvlaError
from qvla_export.greedy import unreachable


@dataclass(frozen=True)
class HullJumps:
    """Jumps between hull vertices, cheapest first; a channel's own stay in order."""

    # int32 [jumps]
    channel: NDArray[np.int32]
    # The level a jump leads to.  int8 [jumps]
    level: NDArray[np.int8]
    # Saved cost and added error, which may be below zero.  float64 [jumps]
    saved: NDArray[np.float64]
    added: NDArray[np.float64]

    def taken(self, start: Levels, count: int) -> Levels:
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
    columns = np.arange(len(start))
    here = start.astype(np.int64)
    slopes, found = np.full(len(start), -np.inf), []
    for _ in range(len(cost) - 1):
        jump = _next_vertex(cost, errors, here, columns, allowed)
        slope, level, moves = jump
        if not moves.any():
            break
        # Rounding must not put a channel's later jump before its earlier one.
        slopes[columns[moves]] = np.maximum(slopes[columns[moves]], slope[moves])
        columns, before, here = columns[moves], here[moves], level[moves]
        allowed = allowed[:, moves]
        found.append(
            (
                slopes[columns],
                columns.astype(np.int32),
                here.astype(np.int8),
                cost[before, columns] - cost[here, columns],
                errors[here, columns] - errors[before, columns],
            )
        )
    if not found:
        empty = np.zeros(0)
        return HullJumps(empty.astype(np.int32), empty.astype(np.int8), empty, empty)
    slope, channel, level, saved, added = (
        np.concatenate(part) for part in zip(*found, strict=True)
    )
    order = np.argsort(slope, kind="stable")
    return HullJumps(channel[order], level[order], saved[order], added[order])


def _next_vertex(
    cost: NDArray[np.float64],
    errors: NDArray[np.float64],
    here: NDArray[np.int64],
    columns: NDArray[np.int64],
    allowed: NDArray[np.bool_],
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    """Slope and level of the flattest way to a lower cost, and whether there is one."""
    cost_here, error_here = cost[here, columns], errors[here, columns]
    slope, level = np.full(len(columns), np.inf), here.copy()
    most_saved = np.zeros(len(columns))
    for target in range(len(cost)):
        saved = cost_here - cost[target, columns]
        candidate = np.full(len(columns), np.inf)
        open_to = allowed[target] & (saved > 0)
        np.divide(errors[target, columns] - error_here, saved, out=candidate, where=open_to)
        better = (candidate < slope) | ((candidate == slope) & open_to & (saved > most_saved))
        slope[better], level[better] = candidate[better], target
        most_saved[better] = saved[better]
    return slope, level, most_saved > 0


def demote_along_hull(
    table: DemotionTable, levels: Levels, cost: NDArray[np.int64], limit: float, what: str
) -> Levels:
    """Take hull jumps until the cost is within the limit, and those that lower the error anyway.

    Args and errors: as of `qvla_export.greedy.demote_greedily`.
    """
    spent = float(_at(cost, levels).sum())

    def enough(jumps: HullJumps) -> int:
        return max(_count_to(jumps, spent - limit), int((jumps.added < 0).sum()))

    def refusal(jumps: HullJumps) -> QvlaError:
        return unreachable(what, limit, spent - float(jumps.saved.sum()), table)

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
        levels: where the channels are.
        cost: of each channel at each width, float64 [widths, channels].
        enough: jumps -> how many to take; more than there are if all do not suffice.
        refusal: jumps -> the error for that case.
    """
    allowed = _below(table, levels)
    while True:
        jumps = hull_jumps(cost, table.errors, levels, allowed)
        count = enough(jumps)
        if count > len(jumps.channel):
            raise refusal(jumps)
        chosen = jumps.taken(levels, count)
        barred = _barred_by_caps(table, chosen, levels) & allowed[-1]
        if not barred.any():
            return chosen
        allowed[-1] &= ~barred


def error_bound(table: DemotionTable, cost: NDArray[np.int64], limit: float) -> float:
    """Return the linear program's error: no plan within the limit has less, whatever made it.

    The caps on pruning are left out, which can only lower it. Infinite where no plan exists.
    """
    start = np.zeros(table.channels, np.int8)
    jumps = hull_jumps(cost.astype(np.float64), table.errors, start, _below(table, start))
    excess = float(cost[0].sum()) - limit
    count = _count_to(jumps, excess)
    if count > len(jumps.channel):
        return float("inf")
    count = max(count, int((jumps.added < 0).sum()))
    error = float(table.errors[0].sum()) + float(jumps.added[:count].sum())
    unused = float(jumps.saved[:count].sum()) - excess
    if count and jumps.added[count - 1] > 0:
        error -= float(jumps.added[count - 1]) * unused / float(jumps.saved[count - 1])
    return error


def _at(values: NDArray[np.int64], levels: Levels) -> NDArray[np.int64]:
    """Pick each channel's value at its level.  [channels]"""
    picked: NDArray[np.int64] = np.take_along_axis(values, levels[None].astype(np.int64), 0)[0]
    return picked


def _count_to(jumps: HullJumps, excess: float) -> int:
    """Fewest jumps that save the excess; one more than there are if all do not."""
    if excess <= 1e-6:
        return 0
    return int(np.searchsorted(np.cumsum(jumps.saved), excess - 1e-6)) + 1


def _below(table: DemotionTable, levels: Levels) -> NDArray[np.bool_]:
    """Levels that each channel may be demoted to.  bool [widths, channels]"""
    allowed = np.arange(len(table.widths))[:, None] > levels
    if table.prunes:
        allowed[-1] &= table.prunable
    return allowed


def _barred_by_caps(table: DemotionTable, chosen: Levels, before: Levels) -> NDArray[np.bool_]:
    """Channels that may not be pruned so that no cap is exceeded.  bool [channels]"""
    barred = np.zeros(table.channels, dtype=bool)
    if not table.prunes or not table.pruning.has_caps:
        return barred
    last = len(table.widths) - 1
    pruned = np.flatnonzero(chosen == last)
    # What was pruned before stays.
    harm = np.where(before[pruned] == last, -np.inf, table.errors[last, pruned])
    pruned = pruned[np.lexsort((harm, table.layer[pruned]))]
    counts = np.bincount(table.layer[pruned], minlength=len(table.layers))
    rank = np.arange(len(pruned)) - np.repeat(np.cumsum(counts) - counts, counts)
    most = np.floor(table.pruning.max_share_of_layer * table.sizes)
    kept = np.zeros(table.channels, dtype=bool)
    kept[pruned[rank < most[table.layer[pruned]]]] = True
    barred |= (counts > most)[table.layer] & ~kept
    most_in_all = int(table.pruning.max_share * table.channels)
    if kept.sum() > most_in_all:
        harm = np.where(before == last, -np.inf, table.errors[last])
        candidates = np.flatnonzero(kept)
        best = candidates[np.argsort(harm[candidates], kind="stable")[:most_in_all]]
        barred[:] = True
        barred[best] = False
    return barred

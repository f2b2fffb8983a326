"""Algorithm 1 of the paper: adjacent demotions in the order its heap yields them. numpy only.

The heap of Algorithm 1 always holds one step a channel, so it yields the steps by the largest rho
met so far along their channel's chain 16 -> 8 -> 4 -> 2 -> 0: a cheap step behind a dear one leaves
the heap directly after it. One stable sort of all steps therefore gives the heap's order, ties by
channel; `tests/test_plan.py` holds it against the printed pseudo-code.
"""

import numpy as np
from numpy.typing import NDArray

from qvla_export.allocation.demotions import DemotionTable, Levels
from qvla_export.shared.errors import QvlaError


def demote_greedily(
    table: DemotionTable, levels: Levels, cost: NDArray[np.int64], limit: float, what: str
) -> Levels:
    """Take further steps, cheapest first, until the cost is within the limit.

    Args:
        table: all demotions.
        levels: where the units are.
        cost: bits of each unit at each width, int64 [widths, units].
        limit: largest sum of bits.
        what: names the limit in the error.

    Raises:
        QvlaError: the limit cannot be met.
    """
    taken = taken_steps(table, levels)
    rho = np.where(taken, -np.inf, ratios(table, cost))
    largest_so_far = np.maximum.accumulate(rho, axis=0)
    order = np.argsort(largest_so_far.T.ravel(), kind="stable")
    return demote_in_order(table, levels, cost, order, limit, what)


def ratios(table: DemotionTable, cost: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return rho of each step (eq. 8).  float64 [widths - 1, units]

    A step that saves nothing is a last resort: it may open the way to one that does.
    """
    saved = cost[:-1] - cost[1:]
    rho: NDArray[np.float64] = np.diff(table.errors, axis=0)
    rho /= np.maximum(saved, 1)
    rho[saved <= 0] = np.inf
    return rho


def taken_steps(table: DemotionTable, levels: Levels) -> NDArray[np.bool_]:
    """Return which steps the levels have behind them.  bool [widths - 1, units]"""
    taken: NDArray[np.bool_] = np.arange(len(table.widths) - 1)[:, None] < levels
    return taken


def demote_in_order(
    table: DemotionTable,
    levels: Levels,
    cost: NDArray[np.int64],
    order: NDArray[np.int64],
    limit: float,
    what: str,
) -> Levels:
    """Take steps in order, those that the pruning rule allows, until the cost is within the limit.

    Args:
        table, levels, cost, limit, what: see `demote_greedily`.
        order: all steps, unit * (widths - 1) + step; those taken lead, a unit's own stay in order.
            int64 [steps]
    """
    saved = cost[:-1] - cost[1:]
    taken = taken_steps(table, levels)
    total = int(cost[0].sum())
    if total - int(saved[taken].sum()) <= limit + 1e-6:
        return levels
    order = allowed_steps(table, order)
    already = int(taken.sum())
    # Cost after each number of steps, counted from none.
    after = total - np.concatenate([[0], np.cumsum(saved.T.ravel()[order])])
    met = np.flatnonzero(after[already:] <= limit + 1e-6)
    if len(met) == 0:
        raise unreachable(what, limit, float(after.min()), table)
    chosen = order[: already + met[0]] // len(saved)
    return np.bincount(chosen, minlength=table.units).astype(np.int8)


def allowed_steps(table: DemotionTable, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Leave out prunings that a threshold forbids or that are beyond a cap."""
    if not table.prunes:
        return order
    # Only last steps are ever forbidden, so nothing waits behind them.
    steps = len(table.widths) - 1
    order = order[(order % steps < steps - 1) | table.prunable[order // steps]]
    rule = table.pruning
    if not rule.has_caps:
        return order
    prunings = np.flatnonzero(order % steps == steps - 1)
    unit = order[prunings] // steps
    kept = np.cumsum(table.members[unit]) <= np.floor(rule.max_share * table.channels)
    if table.unit_of_layer is None:
        layer = table.layer[unit]
        within = _ranks(layer) < np.floor(rule.max_share_of_layer * table.sizes)[layer]
        kept = within & (np.cumsum(within) <= np.floor(rule.max_share * table.channels))
    return np.delete(order, prunings[~kept])


def unreachable(what: str, limit: float, least: float, table: DemotionTable) -> QvlaError:
    """Return the error of a limit in bits that no demotion reaches."""
    return QvlaError(
        f"{what} cannot be met: {limit:.0f} bits allowed, the least that widths {table.widths} "
        f"and the pruning rule reach is {least:.0f}; raise the budget, allow lower widths or "
        "loosen the pruning rule"
    )


def _ranks(layer: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each entry's number among those of the same layer.  int64 [entries]"""
    by_layer = np.argsort(layer, kind="stable")
    counts = np.bincount(layer)
    rank = np.empty(len(layer), np.int64)
    rank[by_layer] = np.arange(len(layer)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank

"""Algorithm 1 of the paper: adjacent demotions in the order its heap yields them. numpy only.

The heap of Algorithm 1 always holds one step a channel, so it yields the steps by the largest rho
met so far along their channel's chain 16 -> 8 -> 4 -> 2 -> 0: a cheap step behind a dear one leaves
the heap directly after it. One stable sort of all steps therefore gives the heap's order, ties by
channel; `tests/test_plan.py` holds it against the printed pseudo-code.
"""

import numpy as np
from numpy.typing import NDArray

from qvla_export.demotions import DemotionTable, Levels
from qvla_export.errors import QvlaError


def demote_greedily(
    table: DemotionTable, levels: Levels, cost: NDArray[np.int64], limit: float, what: str
) -> Levels:
    """Take further steps, cheapest first, until the cost is within the limit.

    Args:
        table: all demotions.
        levels: where the channels are.
        cost: bits of each channel at each width, int64 [widths, channels].
        limit: largest sum of bits.
        what: names the limit in the error.

    Raises:
        QvlaError: the limit cannot be met.
    """
    saved = cost[:-1] - cost[1:]
    taken = np.arange(len(saved))[:, None] < levels
    total = int(cost[0].sum())
    if total - int(saved[taken].sum()) <= limit:
        return levels
    # A step that saves nothing is a last resort: it may open the way to one that does.
    rho = np.where(saved > 0, np.diff(table.errors, axis=0) / np.maximum(saved, 1), np.inf)
    order = _within_caps(_heap_order(np.where(taken, -np.inf, rho), table), table)
    already = int(taken.sum())
    # Cost after each number of steps, counted from none.
    after = total - np.concatenate([[0], np.cumsum(saved.T.ravel()[order])])
    met = np.flatnonzero(after[already:] <= limit + 1e-6)
    if len(met) == 0:
        raise unreachable(what, limit, float(after.min()), table)
    chosen = order[: already + met[0]] // len(saved)
    return np.bincount(chosen, minlength=table.channels).astype(np.int8)


def unreachable(what: str, limit: float, least: float, table: DemotionTable) -> QvlaError:
    """Return the error of a limit in bits that no demotion reaches."""
    return QvlaError(
        f"{what} cannot be met: {limit:.0f} bits allowed, the least that widths {table.widths} "
        f"and the pruning rule reach is {least:.0f}; raise the budget or allow lower widths"
    )


def _heap_order(rho: NDArray[np.float64], table: DemotionTable) -> NDArray[np.int64]:
    """Return the steps in the order Algorithm 1's heap yields them.

    Indices count channels first: channel * steps + step.  int64 [allowed steps]
    """
    largest_so_far = np.maximum.accumulate(rho, axis=0).T.ravel()
    order = np.argsort(largest_so_far, kind="stable")
    if not table.prunes:
        return order
    # Only last steps are ever forbidden, so nothing waits behind them.
    steps = len(rho)
    return order[(order % steps < steps - 1) | table.prunable[order // steps]]


def _within_caps(order: NDArray[np.int64], table: DemotionTable) -> NDArray[np.int64]:
    """Leave out prunings beyond the shares of a layer and of all channels."""
    rule = table.pruning
    if not table.prunes or not rule.has_caps:
        return order
    count = len(table.widths) - 1
    prunings = np.flatnonzero(order % count == count - 1)
    layer = table.layer[order[prunings] // count]
    by_layer = np.argsort(layer, kind="stable")
    pruned = np.bincount(layer, minlength=len(table.layers))
    rank = np.empty(len(layer), np.int64)
    rank[by_layer] = np.arange(len(layer)) - np.repeat(np.cumsum(pruned) - pruned, pruned)
    kept = rank < np.floor(rule.max_share_of_layer * table.sizes)[layer]
    kept &= np.cumsum(kept) <= np.floor(rule.max_share * table.channels)
    return np.delete(order, prunings[~kept])

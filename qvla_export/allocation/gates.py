"""Fixed gate ratios (appendix C, table 6): each width gets a stated share of the channels.

Which channels: the stages of section 3.3.2, each ended by its share instead of by the budget.
numpy only.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qvla_export.allocation.algorithm1 import allowed_steps, ratios, unreachable
from qvla_export.allocation.demotions import DemotionTable, Levels
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WIDTHS

# Width -> share of the channels: the rows of table 6, "INT8 budget", the best first.
GATES: tuple[Mapping[int, float], ...] = (
    {0: 0.01, 2: 0.05, 4: 0.22, 8: 0.56, 16: 0.16},
    {0: 0.05, 2: 0.08, 4: 0.27, 8: 0.355, 16: 0.245},
    {0: 0.08, 2: 0.10, 4: 0.32, 8: 0.185, 16: 0.315},
    {0: 0.10, 2: 0.12, 4: 0.22, 8: 0.25, 16: 0.31},
)
# At the steepest tilt two bits fewer weigh e^64 as much.
_STEEPEST = 32.0
_HALVINGS = 48


def check_gates(gates: Mapping[int, float]) -> None:
    """Refuse shares that are none.

    Raises:
        QvlaError: an unknown width, a negative share, or a sum other than 1.
    """
    fit = set(gates) <= set(WIDTHS) and all(share >= 0 for share in gates.values())
    if not gates or not fit or not abs(sum(gates.values()) - 1) <= 1e-6:
        raise QvlaError(
            f"gates are shares of the channels at widths {WIDTHS} that add up to 1, such as "
            f"0:0.01,2:0.05,4:0.22,8:0.56,16:0.16; got {dict(gates)}"
        )


def demote_to_gates(
    table: DemotionTable,
    levels: Levels,
    cost: NDArray[np.int64],
    limit: float,
    what: str,
    gates: Mapping[int, float],
) -> Levels:
    """Give each width its share of the channels, within the limit.

    Where the shares as given cost more than the limit they are tilted: share times
    exp(-tilt * width), the least tilt that is within it. So one set of shares serves every budget.
    The share of a width that is not allowed goes to the next wider one that is.

    Args:
        gates: width -> share.
        others and errors: see `qvla_export.allocation.algorithm1.demote_greedily`.
    """
    orders = _stage_orders(table, cost)
    shares = _shares_of(table.widths, gates)

    def at(tilt: float) -> Levels:
        return np.maximum(levels, _levels(table, orders, _tilt(shares, table.widths, tilt)))

    def cost_of(found: Levels) -> float:
        return float(np.take_along_axis(cost, found[None].astype(np.int64), 0).sum())

    found = at(0.0)
    if cost_of(found) <= limit + 1e-6:
        return found
    low, high, found = 0.0, _STEEPEST, at(_STEEPEST)
    if cost_of(found) > limit + 1e-6:
        raise unreachable(f"{what}, with gates {dict(gates)},", limit, cost_of(found), table)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = at(middle)
        if cost_of(tried) <= limit + 1e-6:
            high, found = middle, tried
        else:
            low = middle
    return found


def _stage_orders(table: DemotionTable, cost: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Units that each step may be taken by, by rising rho."""
    rho = ratios(table, cost)
    steps, orders = len(rho), []
    for step, row in enumerate(rho):
        order = np.argsort(row, kind="stable") * steps + step
        orders.append((allowed_steps(table, order) if step == steps - 1 else order) // steps)
    return orders


def _shares_of(widths: tuple[int, ...], gates: Mapping[int, float]) -> NDArray[np.float64]:
    """Shares of the allowed widths, from high to low.  float64 [widths]"""
    shares = np.zeros(len(widths))
    for bits, share in gates.items():
        wider = [i for i, allowed in enumerate(widths) if allowed >= bits]
        shares[wider[-1] if wider else 0] += share
    return shares


def _tilt(shares: NDArray[np.float64], widths: tuple[int, ...], tilt: float) -> NDArray[np.float64]:
    bits = np.array(widths, float)
    lowest = bits[shares > 0].min()
    weighted: NDArray[np.float64] = shares * np.exp(-tilt * np.maximum(bits - lowest, 0))
    weighted /= weighted.sum()
    return weighted


def _levels(
    table: DemotionTable, orders: list[NDArray[np.int64]], shares: NDArray[np.float64]
) -> Levels:
    """Run the stages, each until only the share above it is left."""
    levels = np.zeros(table.units, np.int8)
    for step, order in enumerate(orders):
        kept = round(float(shares[: step + 1].sum()) * table.units)
        candidates = order[levels[order] == step]
        levels[candidates[: max(table.units - kept, 0)]] = step + 1
    return levels

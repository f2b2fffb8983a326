"""Widths of whole layers, modules or the policy: the coarse allocations of table 3. numpy only.

Units are few and large, so that the last step of a hull leaves much of a budget unused; it is
filled up again. A handful of units is tried in every combination.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qvla_export.allocation.algorithm1 import unreachable
from qvla_export.allocation.demotions import DemotionTable, Levels
from qvla_export.allocation.hull import demote_along_hull
from qvla_export.quantizer.layer_names import tower_of

Grain = Literal["channel", "layer", "module", "policy"]
# Combinations of widths that are all tried.
_ALL_TRIED = 4096


def units_of(layers: Sequence[str], grain: Grain) -> NDArray[np.int64]:
    """Return the unit of each layer: itself, its module (figure 1a) or the policy."""
    if grain == "policy":
        return np.zeros(len(layers), np.int64)
    names = list(layers) if grain == "layer" else [tower_of(layer) for layer in layers]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names], np.int64)


def demote_layers(
    table: DemotionTable, levels: Levels, cost: NDArray[np.int64], limit: float, what: str
) -> Levels:
    """Give each unit the width that adds least error within the limit.

    The best combination where all can be tried; otherwise hull jumps, and then the promotions that
    still fit, those that take off most error first.

    Args and errors: see `qvla_export.allocation.algorithm1.demote_greedily`.
    """
    if len(table.widths) ** min(table.units, 64) <= _ALL_TRIED:
        return _best_of_all(table, levels, cost, limit, what)
    return _fill(table, levels, demote_along_hull(table, levels, cost, limit, what), cost, limit)


def _best_of_all(
    table: DemotionTable, levels: Levels, cost: NDArray[np.int64], limit: float, what: str
) -> Levels:
    combinations = np.indices((len(table.widths),) * table.units).reshape(table.units, -1).T
    units = np.arange(table.units)
    pruned = (combinations == len(table.widths) - 1) & table.prunes
    allowed = (combinations >= levels).all(axis=1) & ~(pruned & ~table.prunable).any(axis=1)
    most = np.floor(table.pruning.max_share * table.channels)
    allowed &= (pruned * table.members).sum(axis=1) <= most
    spent = cost[combinations, units].sum(axis=1)
    within = np.flatnonzero(allowed & (spent <= limit + 1e-6))
    if len(within) == 0:
        raise unreachable(what, limit, float(spent[allowed].min()), table)
    errors = table.errors[combinations[within], units].sum(axis=1)
    # Of equal errors the cheapest.
    best = within[np.lexsort((spent[within], errors))[0]]
    found: Levels = combinations[best].astype(np.int8)
    return found


def _fill(
    table: DemotionTable, start: Levels, levels: Levels, cost: NDArray[np.int64], limit: float
) -> Levels:
    """Promote units, none above its start, while one fits into what is left of the limit."""
    levels, units = levels.copy(), np.arange(table.units)
    above = np.arange(len(table.widths))[:, None]
    while True:
        left = limit + 1e-6 - cost[levels, units].sum()
        gain = table.errors[levels, units] - table.errors
        fits = (above >= start) & (above < levels) & (cost - cost[levels, units] <= left)
        gain = np.where(fits, gain, 0.0)
        level, unit = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[level, unit] <= 0:
            return levels
        levels[unit] = level

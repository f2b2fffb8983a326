"""The staged variant of section 3.3.2: all 16 -> 8 first, then 8 -> 4, 4 -> 2, 2 -> 0. numpy only.

Within a stage channels are demoted by rising rho (eq. 8). Unlike Algorithm 1 no channel is demoted
to 4 bits while another is still at 16.
"""

import numpy as np
from numpy.typing import NDArray

from qvla_export.allocation.algorithm1 import demote_in_order, ratios, taken_steps
from qvla_export.allocation.demotions import DemotionTable, Levels


def demote_in_stages(
    table: DemotionTable, levels: Levels, cost: NDArray[np.int64], limit: float, what: str
) -> Levels:
    """Take further steps, stage by stage, until the cost is within the limit.

    Args and errors: see `qvla_export.allocation.algorithm1.demote_greedily`.
    """
    taken, rho = taken_steps(table, levels), ratios(table, cost)
    stage = np.broadcast_to(np.arange(len(rho))[:, None], rho.shape)
    order = np.lexsort((rho.T.ravel(), stage.T.ravel(), ~taken.T.ravel()))
    return demote_in_order(table, levels, cost, order, limit, what)

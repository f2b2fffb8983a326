"""The ways to choose widths, by name: the method of the paper, better ones, and baselines.

Each takes further demotions from where the units are until a cost is within a limit, so that one
limit can follow another. numpy only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from qvla_export.allocation.algorithm1 import demote_greedily
from qvla_export.allocation.gates import GATES, check_gates, demote_to_gates
from qvla_export.allocation.hull import demote_along_hull
from qvla_export.allocation.limits import Step
from qvla_export.allocation.staged import demote_in_stages
from qvla_export.allocation.whole_layers import Grain, demote_layers
from qvla_export.shared.errors import QvlaError

AllocationMethod = Literal[
    "hull", "algorithm1", "staged", "gates", "per-layer", "per-module", "uniform"
]
METHODS: tuple[AllocationMethod, ...] = get_args(AllocationMethod)


@dataclass(frozen=True)
class Allocator:
    """One way to choose widths."""

    name: AllocationMethod
    # (table, levels, cost, limit, what) -> levels within the limit, none raised; a QvlaError where
    # there are none.
    step: Step
    # What gets one width.
    grain: Grain = "channel"
    # What a plan records beside the name.
    parameters: Mapping[str, Any] | None = None


_STEPS: Mapping[AllocationMethod, tuple[Step, Grain]] = {
    "hull": (demote_along_hull, "channel"),
    "algorithm1": (demote_greedily, "channel"),
    "staged": (demote_in_stages, "channel"),
    "per-layer": (demote_layers, "layer"),
    "per-module": (demote_layers, "module"),
    "uniform": (demote_layers, "policy"),
}


def find_allocator(name: str, gates: Mapping[int, float] | None = None) -> Allocator:
    """Return the allocator of a name.

    "hull": along lower convex hulls, with a bound. "algorithm1": Algorithm 1 as printed. "staged":
    the text's order, stage by stage. "gates": fixed shares of the widths. "per-layer",
    "per-module", "uniform": one width for all channels of a layer, a module, the policy.

    Args:
        name: see above.
        gates: width -> share of the channels, for "gates"; None for the best row of table 6.

    Raises:
        QvlaError: there is none of this name, or gates for another method.
    """
    if name == "gates":
        shares = GATES[0] if gates is None else gates
        check_gates(shares)
        recorded = {"gates": {str(bits): share for bits, share in sorted(shares.items())}}
        return Allocator("gates", partial(demote_to_gates, gates=shares), parameters=recorded)
    if gates is not None:
        raise QvlaError(f"gates are for the method 'gates', the method is {name!r}; leave them out")
    for known, (step, grain) in _STEPS.items():
        if name == known:
            return Allocator(known, step, grain)
    raise QvlaError(f"the method must be one of {METHODS}, got {name!r}")

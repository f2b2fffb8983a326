"""What a plan is allocated by: method, widths, pruning rule and budget, chosen by a setting's name
or one by one. numpy only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from qvla_export.allocation.alignment import align_within
from qvla_export.allocation.allocate import (
    Allocator,
    Budget,
    BudgetKind,
    LatencyLimit,
    PruningRule,
    allocate_bits,
    find_allocator,
)
from qvla_export.allocation.gates import GATES
from qvla_export.pipeline.run_folder import Setting
from qvla_export.quantizer.plan import BitPlan, uniform_plan
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WIDTHS, Target

# "setting": mean bits per channel and, stored, no more than the uniform width's bytes.
BudgetBy = Literal["setting", "channel", "weight", "bytes"]
# Bits per weight that a uniform plan stores per nominal bit: scales of 16 bits, blocks of 64.
_STORED_PER_BIT = 17 / 16
_KINDS: Mapping[BudgetBy, BudgetKind] = {
    "setting": "bits per channel",
    "channel": "bits per channel",
    "weight": "bits per weight",
    "bytes": "bytes",
}


@dataclass(frozen=True)
class Choices:
    """How a plan is allocated."""

    budget: Budget
    allocator: Allocator = field(default_factory=lambda: find_allocator("hull"))
    # Allowed widths.
    widths: tuple[int, ...] = WIDTHS
    pruning: PruningRule = field(default_factory=PruningRule)

    def allocate(
        self, measured: Sensitivities, target: Target, latency: LatencyLimit | None = None
    ) -> BitPlan:
        """Return a plan within the budget whose buckets fill the target's multiples.

        Raises:
            QvlaError: a limit cannot be met.
        """

        def allocated(share: float, limit: LatencyLimit | None) -> BitPlan:
            return allocate_bits(
                measured,
                self.budget.scaled(share),
                target,
                self.widths,
                self.pruning,
                limit,
                self.allocator,
            )

        return align_within(allocated, measured, target, latency)


def choices_of(
    setting: Setting,
    measured: Sensitivities,
    target: Target,
    budget_by: BudgetBy = "setting",
    budget: float | None = None,
    method: str | None = None,
    gates: Mapping[int, float] | None = None,
    widths: Sequence[int] | None = None,
    pruning: PruningRule | None = None,
) -> Choices:
    """Return what a planned setting's name says, with what is given beside it.

    Args:
        setting: of kind "planned".
        measured: sensitivities of the policy.
        target: what bytes are counted on.
        budget_by: what the budget limits.
        budget: mean bits, or bytes; None for the setting's bits, or the uniform width's bytes.
        method: name of an allocator; None for the setting's.
        gates: width -> share, for the method "gates"; None for the setting's.
        widths: allowed ones; None for the setting's.
        pruning: limits on 0 bits; None for none.

    Raises:
        QvlaError: no such method, or a method, gates or widths beside a setting that names others.
    """
    chosen = method or setting.method
    if setting.method not in ("hull", chosen):
        raise QvlaError(
            f"setting {setting.name} is allocated by {setting.method}, --method says {chosen}; "
            "name one of them"
        )
    if widths is not None and setting.widths not in (WIDTHS, tuple(sorted(set(widths)))):
        raise QvlaError(
            f"setting {setting.name} allows {setting.widths} bits, --widths says {sorted(widths)}; "
            "name one of them"
        )
    if gates is None and setting.gates_row is not None:
        gates = GATES[setting.gates_row - 1]
    cap = _uniform_ratio(setting.bits, measured, target)
    if budget is None:
        budget = setting.bits if budget_by != "bytes" else cap * _float16_bytes(measured)
    elif budget_by == "setting":
        raise QvlaError(f"--budget {budget:g} needs --budget-by channel, weight or bytes")
    limit = Budget(_KINDS[budget_by], budget)
    if budget_by == "setting":
        limit = replace(limit, max_stored_ratio=cap)
    return Choices(
        limit,
        find_allocator(chosen, gates),
        setting.widths if widths is None else tuple(sorted(set(widths))),
        pruning or PruningRule(),
    )


def shapes_of(measured: Sensitivities) -> dict[str, tuple[int, int]]:
    """Return (channels, weights of one channel) of each layer."""
    return {
        name: (values.shape[1], measured.weights_per_channel[name])
        for name, values in measured.values.items()
    }


def _float16_bytes(measured: Sensitivities) -> int:
    return sum(2 * channels * inputs for channels, inputs in shapes_of(measured).values())


def _uniform_ratio(bits: float, measured: Sensitivities, target: Target) -> float:
    """Stored share of float16's bytes where every channel has so many bits."""
    if bits not in target.containers:
        return bits / 16 * _STORED_PER_BIT
    return uniform_plan(shapes_of(measured), int(bits), target, measured.policy_digest).ratio

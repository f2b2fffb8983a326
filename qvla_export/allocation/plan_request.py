"""The noun `PlanRequest`: method, widths, pruning rule and budget that a plan is allocated by.

A setting's name says them, or they are chosen one by one. numpy only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
from qvla_export.allocation.setting import Setting
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import scale_form
from qvla_export.quantizer.uniform_plan import uniform_plan
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
class PlanOverrides:
    """What is chosen beside a setting's name; None leaves a choice to the setting."""

    # What the budget limits.
    budget_by: BudgetBy = "setting"
    # Mean bits, or bytes; None for the setting's bits, or the uniform width's bytes.
    budget: float | None = None
    # Name of an allocator.
    method: str | None = None
    # Width -> share, for the method "gates".
    gates: Mapping[int, float] | None = None
    # Allowed widths.
    widths: tuple[int, ...] | None = None
    # Limits on 0 bits.
    pruning: PruningRule = field(default_factory=PruningRule)


@dataclass(frozen=True)
class PlanRequest:
    """How a plan is allocated."""

    budget: Budget
    allocator: Allocator = field(default_factory=lambda: find_allocator("hull"))
    # Allowed widths.
    widths: tuple[int, ...] = WIDTHS
    pruning: PruningRule = field(default_factory=PruningRule)

    @classmethod
    def for_setting(
        cls,
        setting: Setting,
        measured: Sensitivities,
        target: Target,
        overrides: PlanOverrides = PlanOverrides(),
    ) -> "PlanRequest":
        """Return what a planned setting's name says, with what is chosen beside it.

        Args:
            setting: of kind "planned".
            measured: sensitivities of the policy.
            target: what bytes are counted on.
            overrides: chosen beside the name.

        Raises:
            QvlaError: no such method, or a method, gates or widths beside a setting that names
                others.
        """
        _require_one_choice(setting, overrides)
        gates = overrides.gates
        if gates is None and setting.gates_row is not None:
            gates = GATES[setting.gates_row - 1]
        widths = overrides.widths
        return cls(
            _budget(setting, measured, target, overrides),
            find_allocator(overrides.method or setting.method, gates),
            _widths(setting, measured) if widths is None else tuple(sorted(set(widths))),
            overrides.pruning,
        )

    def allocate(
        self, measured: Sensitivities, target: Target, latency: LatencyLimit | None = None
    ) -> BitPlan:
        """Return a plan within the budget whose buckets fill the target's multiples.

        Raises:
            QvlaError: a limit cannot be met.
        """

        def plan_within(share: float, limit: LatencyLimit | None) -> BitPlan:
            return allocate_bits(
                measured,
                self.budget.times(share),
                target,
                self.widths,
                self.pruning,
                limit,
                self.allocator,
            )

        return align_within(plan_within, measured, target, latency)


def shapes_of(measured: Sensitivities) -> dict[str, tuple[int, int]]:
    """Return (channels, weights of one channel) of each layer."""
    return {
        name: (values.shape[1], measured.weights_per_channel[name])
        for name, values in measured.values.items()
    }


def _widths(setting: Setting, measured: Sensitivities) -> tuple[int, ...]:
    """Return a setting's widths: those that expand to 8 bits where the inputs are rounded.

    A channel of 16 bits would be a product of floats beside that of integers.
    """
    expands = setting.activation_bits is not None and scale_form(measured.quantizer) == "two-level"
    if expands and setting.widths == WIDTHS:
        return tuple(bits for bits in WIDTHS if bits != 16)
    return setting.widths


def _require_one_choice(setting: Setting, overrides: PlanOverrides) -> None:
    if overrides.method is not None and setting.method not in ("hull", overrides.method):
        raise QvlaError(
            f"setting {setting.name} is allocated by {setting.method}, --method says "
            f"{overrides.method}; name one of them"
        )
    widths = overrides.widths
    if widths is not None and setting.widths not in (WIDTHS, tuple(sorted(set(widths)))):
        raise QvlaError(
            f"setting {setting.name} allows {setting.widths} bits, --widths says {sorted(widths)}; "
            "name one of them"
        )


def _budget(
    setting: Setting, measured: Sensitivities, target: Target, overrides: PlanOverrides
) -> Budget:
    budget_by, amount = overrides.budget_by, overrides.budget
    cap = _uniform_ratio(setting.bits, measured, target)
    if amount is None:
        amount = setting.bits if budget_by != "bytes" else cap * _float16_bytes(measured)
    elif budget_by == "setting":
        raise QvlaError(f"--budget {amount:g} needs --budget-by channel, weight or bytes")
    capped = cap if budget_by == "setting" else None
    return Budget(_KINDS[budget_by], amount, capped, setting.activation_bits is not None)


def _float16_bytes(measured: Sensitivities) -> int:
    return sum(2 * channels * inputs for channels, inputs in shapes_of(measured).values())


def _uniform_ratio(bits: float, measured: Sensitivities, target: Target) -> float:
    """Stored share of float16's bytes where every channel has so many bits."""
    if bits not in target.containers:
        return bits / 16 * _STORED_PER_BIT
    return uniform_plan(shapes_of(measured), int(bits), target, measured.policy_digest).ratio

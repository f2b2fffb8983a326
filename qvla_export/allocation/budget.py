"""The noun `Budget`: how much a plan may cost, and how long an action may take. numpy only."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from qvla_export.latency_model.roofline import LatencyModel, Widths
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import ActivationSupport

BudgetKind = Literal["bits per channel", "bits per weight", "bytes"]


@dataclass(frozen=True)
class Budget:
    """How much a plan may cost.

    Budget("bits per channel", 4.0)                          # the paper's average
    Budget("bits per channel", 4.0, max_stored_ratio=0.29)   # and at most 29 % of float16's bytes
    Budget("bytes", 3_000_000)                               # all that the target stores
    """

    kind: BudgetKind
    # Mean bits, or bytes.
    value: float
    # Largest stored share of the float16 bytes, with scales, order and biases; None for no limit.
    max_stored_ratio: float | None = None
    # Whether layers will read rounded inputs: their graph holds other constants then.
    rounded_inputs: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(BudgetKind):
            raise QvlaError(f"a budget is one of {get_args(BudgetKind)}, got {self.kind!r}")
        if not np.isfinite(self.value) or self.value < 0:
            raise QvlaError(f"a budget must be a number >= 0, got {self.value}")
        if self.max_stored_ratio is not None and not self.max_stored_ratio >= 0:
            raise QvlaError(f"max_stored_ratio must be >= 0, got {self.max_stored_ratio}")

    def times(self, share: float) -> "Budget":
        """Return a share of the budget, of both its limits."""
        cap = self.max_stored_ratio
        capped = None if cap is None else share * cap
        return replace(self, value=share * self.value, max_stored_ratio=capped)

    def to_json(self) -> dict[str, Any]:
        """Return what a plan records."""
        return asdict(self)

    def __str__(self) -> str:
        if self.kind == "bytes":
            text = f"{self.value:.0f} bytes"
        else:
            text = f"{self.value:g} mean {self.kind}"
        if self.max_stored_ratio is None:
            return text
        return f"{text}, stored at most {self.max_stored_ratio:g} of float16"


@dataclass(frozen=True)
class LatencyLimit:
    """Predicted milliseconds of one action that a plan must stay within."""

    max_ms: float
    # Predicts the very policy the plan is for.
    model: LatencyModel
    activations: ActivationSupport = "none"

    def __post_init__(self) -> None:
        if not self.max_ms > 0:
            raise QvlaError(f"a latency limit must be above 0 ms, got {self.max_ms}")

    def used_by(self, widths: Widths) -> float:
        """Return the share of the limit that widths are predicted to take; 1 just keeps it."""
        return self.model.predict(widths, self.activations).total_ms / self.max_ms

    def __str__(self) -> str:
        return (
            f"at most {self.max_ms:g} ms predicted on {self.model.target.name} "
            f"in mode {self.model.mode.name}"
        )

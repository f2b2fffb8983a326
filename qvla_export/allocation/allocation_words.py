"""The noun `AllocationWords`: what a command line says of an allocation, unparsed. numpy only."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from qvla_export.allocation.allocate import PruningRule
from qvla_export.allocation.plan_request import BudgetBy, PlanOverrides, PlanRequest
from qvla_export.allocation.setting import Setting
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Target

# Name of a regularizer -> field of `PruningRule`.
_REGULARIZERS = {
    "absolute-threshold": "absolute_threshold",
    "relative-threshold": "relative_threshold",
    "max-share": "max_share",
    "max-share-of-layer": "max_share_of_layer",
}


@dataclass(frozen=True)
class AllocationWords:
    """What is said about an allocation beside the setting; None leaves a choice to it."""

    # Name of an allocator.
    method: str | None = None
    # WIDTH:SHARE,... of the method "gates".
    gates: str | None = None
    # Such as 0,8.
    widths: str | None = None
    budget_by: BudgetBy = "setting"
    budget: float | None = None
    # NAME=NUMBER each.
    regularizers: tuple[str, ...] = ()

    def request(
        self, setting: Setting, measured: Sensitivities, target: Target
    ) -> PlanRequest | None:
        """Return the request for a planned setting; None for another.

        Raises:
            QvlaError: something is no number, no name, or given beside fixed widths.
        """
        if setting.kind != "planned":
            named = [name for name, value in asdict(self).items() if value]
            if named != ["budget_by"] or self.budget_by != "setting":
                raise QvlaError(
                    f"setting {setting.name} is not allocated; leave out what is given for that: "
                    f"{', '.join(named)}"
                )
            return None
        overrides = PlanOverrides(
            self.budget_by,
            self.budget,
            self.method,
            parse_gates(self.gates),
            parse_widths(self.widths),
            parse_pruning_rule(self.regularizers),
        )
        return PlanRequest.for_setting(setting, measured, target, overrides)


def parse_widths(text: str | None) -> tuple[int, ...] | None:
    """Return the widths of "0,2,8"; None where there is no text.

    Raises:
        QvlaError: one is no number.
    """
    if text is None:
        return None
    try:
        return tuple(int(bits) for bits in text.split(","))
    except ValueError as error:
        raise QvlaError(f"--widths takes widths such as 0,2,4,8,16, got {text!r}") from error


def parse_gates(text: str | None) -> dict[int, float] | None:
    """Return width -> share of "8:0.75,0:0.25"; None where there is no text.

    Raises:
        QvlaError: a width or a share is no number.
    """
    if text is None:
        return None
    try:
        pairs = [part.partition(":") for part in text.split(",")]
        return {int(bits): float(share) for bits, _, share in pairs}
    except ValueError as error:
        raise QvlaError(
            f"--gates takes WIDTH:SHARE,... such as 0:0.01,2:0.05,4:0.22,8:0.56,16:0.16, "
            f"got {text!r}"
        ) from error


def parse_pruning_rule(texts: Sequence[str]) -> PruningRule:
    """Return the rule of texts such as "max-share=0.1".

    Raises:
        QvlaError: no regularizer has that name, or its limit is no number.
    """
    limits = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            limits[_REGULARIZERS[name]] = float(value)
        except (KeyError, ValueError) as error:
            raise QvlaError(
                f"--regularizer takes NAME=NUMBER with a name of {sorted(_REGULARIZERS)}, "
                f"got {text!r}"
            ) from error
    return PruningRule(**limits)

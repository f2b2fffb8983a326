"""`qvla plan`: widths of channels under a budget, by any of the allocators."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qvla_export.cli.options import (
    ForceOption,
    JsonOption,
    LimitedPolicyOption,
    MaxPredictedOption,
    PowerModeOption,
    PresetOption,
    RatesOption,
    RunOption,
    SettingOption,
    TargetOption,
)
from qvla_export.cli.progress import print_json, progress_shown
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.allocation.allocate import PruningRule
    from qvla_export.allocation.plan_request import BudgetBy, PlanRequest
    from qvla_export.allocation.setting import Setting
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.sensitivity.sensitivities import Sensitivities
    from qvla_export.shared.target import Target

# Name of a regularizer -> field of `PruningRule`.
_REGULARIZERS = {
    "absolute-threshold": "absolute_threshold",
    "relative-threshold": "relative_threshold",
    "max-share": "max_share",
    "max-share-of-layer": "max_share_of_layer",
}

MethodOption = Annotated[
    Literal["hull", "algorithm1", "staged", "gates", "per-layer", "per-module", "uniform"] | None,
    typer.Option(
        help="hull: along convex hulls, with a bound; algorithm1: as printed; staged: the text's "
        "order; gates: fixed shares (table 6); per-layer, per-module, uniform: one width for all "
        "channels of each. Default: the setting's, hull for w4."
    ),
]
WidthsOption = Annotated[
    str | None, typer.Option(help="Allowed widths, such as 0,8. Default: 0,2,4,8,16.")
]
BudgetByOption = Annotated[
    Literal["setting", "channel", "weight", "bytes"],
    typer.Option(
        help="What the budget limits: mean bits per channel, mean bits per weight, or stored bytes "
        "with scales; setting: bits per channel, and no more bytes than the uniform width."
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(help="Mean bits, or bytes. Default: the setting's bits, the uniform bytes."),
]
GatesOption = Annotated[
    str | None,
    typer.Option(
        help="Shares of the channels for --method gates, WIDTH:SHARE,...; tilted to narrower "
        "widths where they exceed the budget. Default: the best row of table 6."
    ),
]
RegularizersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--regularizer",
        help="Limit on pruning, repeat: absolute-threshold=S and relative-threshold=R keep "
        "channels whose sensitivity at 0 bits is above S, above R times their layer's mean; "
        "max-share=X (L0-style) and max-share-of-layer=X cap the share that is pruned.",
    ),
]


def plan(
    run: RunOption,
    setting: SettingOption,
    target: TargetOption = "cpu",
    method: MethodOption = None,
    widths: WidthsOption = None,
    budget_by: BudgetByOption = "setting",
    budget: BudgetOption = None,
    gates: GatesOption = None,
    regularizers: RegularizersOption = None,
    activations_method: Annotated[
        Literal["max", "percentile", "mse", "entropy"],
        typer.Option(help="How the ranges of 8-bit activations are chosen."),
    ] = "percentile",
    max_predicted_ms: MaxPredictedOption = None,
    power_mode: PowerModeOption = None,
    rates: RatesOption = None,
    policy: LimitedPolicyOption = None,
    preset: PresetOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Allocate bits to channels under a budget, and under a predicted latency if one is given."""
    from engines.targets import find_target
    from qvla_export.allocation.setting import parse_setting
    from qvla_export.pipeline.plan import PlanOptions, load_sensitivities
    from qvla_export.pipeline.plan import plan as plan_setting
    from qvla_export.pipeline.predict import Device, latency_limit, plan_figures
    from qvla_export.pipeline.run_folder import RunFolder
    from qvla_export.quantizer.packed_storage import stored_on

    folder, device = RunFolder(run, force), find_target(target)
    parsed, measured = parse_setting(setting, device), load_sensitivities(folder)
    words = _AllocationWords(method, gates, widths, budget_by, budget, tuple(regularizers or ()))
    request = words.request(parsed, measured, device)
    limit = None
    if max_predicted_ms is not None:
        place = Device(stored_on(device, measured.quantizer), power_mode, rates)
        limit = latency_limit(max_predicted_ms, place, measured, parsed, policy, preset)
    options = PlanOptions(activations_method, limit, request)
    with progress_shown() as hear:
        planned = plan_setting(folder, parsed, device, measured.policy_digest, options, hear)
    if planned is None:
        raise QvlaError("the float setting has no plan; choose w4, w8a8, w4-rtn, ...")
    if as_json:
        print_json(_figures(planned, folder.plan(parsed)))
        return
    typer.echo(_summary(planned, folder.plan(parsed)))
    typer.echo(plan_figures(planned, measured, request, device, limit))


@dataclass(frozen=True)
class _AllocationWords:
    """What the command line says about an allocation beside the setting."""

    method: str | None
    gates: str | None
    widths: str | None
    budget_by: "BudgetBy"
    budget: float | None
    regularizers: tuple[str, ...]

    def request(
        self, setting: "Setting", measured: "Sensitivities", target: "Target"
    ) -> "PlanRequest | None":
        """Return the request for a planned setting; None for another.

        Raises:
            QvlaError: something is no number, no name, or given beside fixed widths.
        """
        from qvla_export.allocation.plan_request import PlanOverrides, PlanRequest

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
            _gates(self.gates),
            _widths(self.widths),
            _pruning_rule(self.regularizers),
        )
        return PlanRequest.for_setting(setting, measured, target, overrides)


def _summary(planned: "BitPlan", path: Path) -> str:
    return (
        f"plan: {planned.mean_bits_per_channel:.2f} mean bits per channel, "
        f"{planned.mean_bits_per_weight:.2f} per weight, "
        f"{planned.stored_bits_per_weight:.2f} stored, {planned.ratio:.3f} of float16 "
        f"-> {path}"
    )


def _figures(planned: "BitPlan", path: Path) -> dict[str, Any]:
    return {
        "plan": str(path),
        "mean_bits_per_channel": planned.mean_bits_per_channel,
        "mean_bits_per_weight": planned.mean_bits_per_weight,
        "stored_bits_per_weight": planned.stored_bits_per_weight,
        "weight_bytes": planned.weight_bytes,
        "ratio": planned.ratio,
        "expected_error": planned.expected_error,
    }


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(bits) for bits in text.split(","))
    except ValueError as error:
        raise QvlaError(f"--widths takes widths such as 0,2,4,8,16, got {text!r}") from error


def _gates(text: str | None) -> dict[int, float] | None:
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


def _pruning_rule(texts: tuple[str, ...]) -> "PruningRule":
    from qvla_export.allocation.allocate import PruningRule

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

"""`qvla plan`: widths of channels under a budget, by any of the allocators."""

from typing import Annotated, Literal

import typer

from qvla_export.cli.options import (
    ForceOption,
    JsonOption,
    LimitedPolicyOption,
    MaxPredictedOption,
    PowerModeOption,
    PresetOption,
    RangesOption,
    RatesOption,
    RunOption,
    SettingOption,
    TargetOption,
    TuneCodesOption,
)
from qvla_export.cli.progress import print_json, print_texts, progress_shown
from qvla_export.shared.errors import QvlaError

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
        help="What the budget limits: mean bits per channel, mean bits per weight, or all stored "
        "bytes; setting: bits per channel, and no more bytes than the uniform width."
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
    activations_method: RangesOption = "percentile",
    max_predicted_ms: MaxPredictedOption = None,
    power_mode: PowerModeOption = None,
    rates: RatesOption = None,
    policy: LimitedPolicyOption = None,
    preset: PresetOption = None,
    tune_codes: TuneCodesOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Allocate bits to channels under a budget, and under a predicted latency if one is given."""
    from engines.targets import find_target
    from qvla_export.allocation.allocation_words import AllocationWords
    from qvla_export.allocation.setting import parse_setting
    from qvla_export.pipeline.plan import PlanOptions, load_sensitivities
    from qvla_export.pipeline.plan import plan as plan_setting
    from qvla_export.pipeline.predict import Device, latency_limit
    from qvla_export.pipeline.run_folder import RunFolder
    from qvla_export.pipeline.texts.plan_summary import plan_figures, plan_lines
    from qvla_export.quantizer.packed_storage import stored_on

    folder, device = RunFolder(run, force), find_target(target)
    parsed, measured = parse_setting(setting, device), load_sensitivities(folder)
    words = AllocationWords(method, gates, widths, budget_by, budget, tuple(regularizers or ()))
    request = words.request(parsed, measured, device)
    limit = None
    if max_predicted_ms is not None:
        place = Device(stored_on(device, measured.quantizer), power_mode, rates)
        limit = latency_limit(max_predicted_ms, place, measured, parsed, policy, preset)
    options = PlanOptions(activations_method, limit, request, tune_codes)
    with progress_shown() as hear:
        planned = plan_setting(folder, parsed, device, measured.policy_digest, options, hear)
    if planned is None:
        raise QvlaError("the float setting has no plan; choose w4, w8a8, w4-rtn, ...")
    path = folder.plan(parsed)
    if as_json:
        print_json(plan_figures(planned, path))
    else:
        print_texts(plan_lines(planned, path, measured, device, options))

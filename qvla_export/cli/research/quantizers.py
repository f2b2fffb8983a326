"""`qvla quantizers`: what each part of the quantizer does to held-out actions."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qvla_export.cli.options import (
    PolicyOption,
    PresetOption,
    RunOption,
    TargetOption,
    UnnormKeyOption,
)
from qvla_export.shared.artifacts import versions, write_json


def quantizers(
    run: RunOption,
    policy: PolicyOption,
    target: TargetOption = "cpu",
    bits: Annotated[str, typer.Option(help="Mean bits of the plans, comma-separated.")] = (
        "4,3,2.5,2"
    ),
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("quantizers.json"),
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Compare what each part of the quantizer does to held-out actions.

    Plans are those of the sensitivities; with zero points they are made anew for the same bytes.
    """
    from calibration.calibration_set import CalibrationSet
    from engines.targets import find_target
    from qvla_export.allocation.plan_request import PlanRequest
    from qvla_export.allocation.setting import parse_setting
    from qvla_export.pipeline import moments as compensating
    from qvla_export.pipeline.policy_source import open_checkpoint
    from qvla_export.pipeline.quantizers import compared, equal_plans
    from qvla_export.pipeline.run_folder import RunFolder
    from qvla_export.sensitivity.sensitivities import Sensitivities

    folder, device = RunFolder(run), find_target(target)
    loaded = open_checkpoint(policy, unnorm_key, preset)
    measured = Sensitivities.load(folder.sensitivities)
    found = compensating.moments(folder, loaded)
    held_out = CalibrationSet.load(folder.calibration).held_out
    rows: list[dict[str, Any]] = []
    for text in bits.split(","):
        request = PlanRequest.for_setting(parse_setting(f"w{text}", device), measured, device)
        plans = equal_plans(request, measured, device)
        for row in compared(loaded, plans, found, held_out):
            rows.append({"mean_bits": text, **row})
            typer.echo(
                f"w{text} {row['share_of_float16']:.4f}  {row['quantizer']:<40} "
                f"{row['rms']:.5f}  {row['seconds']:.1f} s"
            )
    about = {"sensitivities_digest": measured.digest, "moments_digest": found.digest}
    write_json(output, {**about, "versions": versions(), "rows": rows})

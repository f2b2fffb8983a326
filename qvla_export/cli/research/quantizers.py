"""`qvla quantizers`: what each part of the quantizer does to held-out actions."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import (
    JsonOption,
    PolicyOption,
    PresetOption,
    RunOption,
    TargetOption,
    UnnormKeyOption,
)
from qvla_export.cli.progress import print_json, progress_shown


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
    as_json: JsonOption = False,
) -> None:
    """Compare what each part of the quantizer does to held-out actions.

    Plans are those of the sensitivities; with zero points or scales of two levels they are made
    anew for the same bytes.
    """
    from engines.targets import find_target
    from qvla_export.pipeline.policy_source import open_checkpoint
    from qvla_export.pipeline.quantizers import compare_quantizers
    from qvla_export.pipeline.run_folder import RunFolder

    loaded, device = open_checkpoint(policy, unnorm_key, preset), find_target(target)
    with progress_shown() as on_progress:
        comparison = compare_quantizers(
            RunFolder(run), loaded, device, bits.split(","), on_progress
        )
    comparison.save(output)
    if as_json:
        print_json(comparison.to_json())
        return
    for row in comparison.rows:
        typer.echo(
            f"w{row.mean_bits} {row.share_of_float16:.4f}  {row.quantizer:<40} {row.rms:.5f}  "
            f"{row.seconds:.1f} s"
        )

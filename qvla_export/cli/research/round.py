"""`qvla round`: codes of a plan that make up for each other's errors."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import (
    A_CALIBRATION,
    ForceOption,
    PolicyOption,
    PresetOption,
    RunOption,
    SettingOption,
    UnnormKeyOption,
)
from qvla_export.cli.progress import progress_shown
from qvla_export.shared.errors import QvlaError


def round_command(
    run: RunOption,
    policy: PolicyOption,
    setting: SettingOption,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    force: ForceOption = False,
    judge_by: Annotated[
        Path | None,
        typer.Option(
            "--judge-by",
            help="Calibration set (RUN/calibration): the action error on those of its observations "
            "that no plan is made from is printed, in torch with the whole policy in memory.",
            callback=A_CALIBRATION.require,
        ),
    ] = None,
    cross_validate: Annotated[
        bool,
        typer.Option(
            help="Predict the action error on other episodes, and how much errors add to each "
            "other's, from the calibration set alone.",
        ),
    ] = False,
) -> None:
    """Make the codes of a plan whose quantizer compensates errors; qvla export packs them."""
    from qvla_export.allocation.setting import parse_setting
    from qvla_export.pipeline.calibrate import judging_observations
    from qvla_export.pipeline.deployment.cross_validation import predict_error
    from qvla_export.pipeline.fake_quantized import judge_plan, plan_divergence
    from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
    from qvla_export.pipeline.resources import can_stay_on_disk
    from qvla_export.pipeline.round import round_setting
    from qvla_export.pipeline.run_folder import RunFolder

    folder, parsed = RunFolder(run, force), parse_setting(setting)
    judges = None if judge_by is None else judging_observations(folder, judge_by)
    source = PolicySource(str(policy), unnorm_key, preset)
    stays = judges is None and not cross_validate and can_stay_on_disk(source)
    opened = open_checkpoint(policy, unnorm_key, preset, resident=not stays)
    with progress_shown() as on_progress:
        planned = round_setting(folder, parsed, opened, on_progress=on_progress)
    if planned is None or planned.rounding is None:
        raise QvlaError(
            f"the plan of {setting} takes the nearest codes, nothing is to be made; for others: "
            "qvla sensitivities --quantizer compensated, then qvla plan"
        )
    typer.echo(f"rounding: {len(planned.rounding.layers)} layers -> {folder.rounding(parsed)}")
    if judges is not None:
        drift = judge_plan(opened, planned, judges)
        typer.echo(
            f"action error: RMS {drift.rms:.5f} of normalized actions on {drift.observations} "
            f"observations of {judge_by}; of the median observation {drift.median_rms:.5f}"
        )
        tokens = plan_divergence(opened, planned, judges)
        if tokens is not None:
            typer.echo(f"given the float policy's tokens: RMS {tokens.expected_rms:.5f}")
    if cross_validate:
        typer.echo(predict_error(folder, parsed, opened))

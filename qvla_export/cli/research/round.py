"""`qvla round`: codes of a plan that make up for each other's errors."""

import typer

from qvla_export.cli.options import (
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
) -> None:
    """Make the codes of a plan whose quantizer compensates errors; qvla export packs them."""
    from qvla_export.allocation.setting import parse_setting
    from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
    from qvla_export.pipeline.resources import can_stay_on_disk
    from qvla_export.pipeline.round import round_setting
    from qvla_export.pipeline.run_folder import RunFolder

    folder, parsed = RunFolder(run, force), parse_setting(setting)
    stays = can_stay_on_disk(PolicySource(str(policy), unnorm_key, preset))
    opened = open_checkpoint(policy, unnorm_key, preset, resident=not stays)
    with progress_shown() as on_progress:
        planned = round_setting(folder, parsed, opened, on_progress=on_progress)
    if planned is None or planned.rounding is None:
        raise QvlaError(
            f"the plan of {setting} takes the nearest codes, nothing is to be made; for others: "
            "qvla sensitivities --quantizer compensated, then qvla plan"
        )
    typer.echo(f"rounding: {len(planned.rounding.layers)} layers -> {folder.rounding(parsed)}")

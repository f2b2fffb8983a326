"""Optional artifacts that a run lacks, and the commands that make them."""

from dataclasses import dataclass
from shlex import quote

from qvla_export.report.run_data import CONTROLS, RunData


@dataclass(frozen=True)
class Missing:
    """An optional artifact that a run lacks."""

    # In words.
    what: str
    # What makes it.
    command: str


def missing_artifacts(data: RunData) -> dict[str, list[Missing]]:
    """Return the optional artifacts that are not there, by the page's section."""
    run = quote(data.folder)
    deploy = f"qvla deploy --policy <checkpoint> --run {run}"
    absent: dict[str, list[Missing]] = {"calibration": [], "agreement": []}
    if data.calibration is None:
        absent["calibration"].append(Missing("calibration set", f"qvla calibrate --run {run}"))
    if data.agreement is None:
        command = f"qvla sensitivities --run {run} --policy <checkpoint> --check-pairs 500"
        absent["agreement"].append(Missing("comparison with exact sensitivities", command))
    settings = data.settings
    absent["action_error"] = [
        Missing(f"action error of {s.name}", deploy) for s in settings if s.action_error is None
    ]
    absent["latency"] = [
        Missing(f"latency of {s.name}", deploy) for s in settings if s.latency is None
    ]
    absent["evaluation"] = [
        Missing(f"closed-loop episodes of {s.name}", _evaluate_command(data.folder, s.name))
        for s in settings
        if s.rollouts is None
    ]
    absent["controls"] = [
        Missing(f"{name} control", _control_command(data, name))
        for name in CONTROLS
        if name not in data.controls
    ]
    return {section: pieces for section, pieces in absent.items() if pieces}


def _evaluate_command(run: str, setting: str) -> str:
    folder = f"{run}/settings/{setting}"
    output = quote(f"{folder}/evaluation.json")
    return f"qvla evaluate {quote(folder + '/bundle')} --reference <checkpoint> --output {output}"


def _control_command(data: RunData, control: str) -> str:
    first = data.float_setting or data.settings[0]
    bundle = quote(f"{data.folder}/settings/{first.name}/bundle")
    output = quote(f"{data.folder}/controls/{control}.json")
    return f"qvla evaluate {bundle} --control {control} --output {output}"

"""Optional artifacts that a run lacks, and the commands that make them."""

from dataclasses import dataclass
from shlex import quote

from qvla_export.report.run_data import CONTROLS, RunData


@dataclass(frozen=True)
class Missing:
    """An optional artifact that a run lacks and could have."""

    # In words.
    what: str
    # What makes it.
    command: str
    # Whether the run was to make it, and was interrupted or changed since.
    is_due: bool = True


def missing_artifacts(data: RunData) -> dict[str, list[Missing]]:
    """Return the optional artifacts that are not there, by the page's section.

    What a run cannot have is not among them: latency of a target that another machine runs,
    episodes of a policy that no simulator here fits.
    """
    run, stages = quote(data.folder), data.info.stages
    deploy = f"qvla deploy --policy <checkpoint> --run {run}"
    absent: dict[str, list[Missing]] = {"calibration": [], "agreement": []}
    if data.calibration is None:
        absent["calibration"].append(Missing("calibration set", f"qvla calibrate --run {run}"))
    if data.agreement is None:
        command = f"qvla sensitivities --run {run} --policy <checkpoint> --check-pairs 500"
        due = stages.get("agreement", True)
        absent["agreement"].append(Missing("comparison with exact sensitivities", command, due))
    unjudged = [s.name for s in data.settings if s.action_error is None]
    absent["action_error"] = _of_settings("action error", unjudged, deploy)
    if data.recommendation is None:
        absent["recommendation"] = [Missing("recommendation", deploy)]
    if stages.get("latency", True):
        untimed = [s.name for s in data.settings if s.latency is None]
        absent["latency"] = _of_settings("latency", untimed, deploy)
    if stages.get("episodes", _is_simulated(data)):
        absent |= _missing_episodes(data)
    return {section: pieces for section, pieces in absent.items() if pieces}


def _of_settings(what: str, names: list[str], command: str) -> list[Missing]:
    return [Missing(f"{what} of {', '.join(names)}", command)] if names else []


def _is_simulated(data: RunData) -> bool:
    """Whether a run whose stages are not known was judged in the simulator that it drew from."""
    return data.calibration is None or "simulator" in data.calibration["source"]


def _missing_episodes(data: RunData) -> dict[str, list[Missing]]:
    missing: dict[str, list[Missing]] = {}
    unplayed = [s.name for s in data.settings if s.rollouts is None]
    if unplayed:
        command = _evaluate_command(data.folder, unplayed[0])
        missing["evaluation"] = _of_settings("closed-loop episodes", unplayed, command)
    controls = [name for name in CONTROLS if name not in data.controls]
    if controls:
        what = f"{' and '.join(controls)} control"
        missing["controls"] = [Missing(what, _control_command(data, controls[0]))]
    return missing


def _evaluate_command(run: str, setting: str) -> str:
    folder = f"{run}/settings/{setting}"
    output = quote(f"{folder}/evaluation.json")
    return f"qvla evaluate {quote(folder + '/bundle')} --reference <checkpoint> --output {output}"


def _control_command(data: RunData, control: str) -> str:
    first = data.float_setting or data.settings[0]
    bundle = quote(f"{data.folder}/settings/{first.name}/bundle")
    output = quote(f"{data.folder}/controls/{control}.json")
    return f"qvla evaluate {bundle} --control {control} --output {output}"

"""The step that writes a run's page, and takes in what robots measured of its bundles."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import ArtifactMismatch, QvlaError

if TYPE_CHECKING:
    from jetson.latency.profile import LatencyProfile
    from qvla_export.report.run_data import RunData


def report_run(run: Path, robot_profiles: Sequence[Path] = ()) -> Path:
    """Write `report.html`; profiles of robots are taken into the run folder first.

    Raises:
        ArtifactError: an artifact or a robot's file is missing or damaged.
        ArtifactMismatch: a robot's file is of bundles that are not this run's.
    """
    from qvla_export.report.page import write_report

    if robot_profiles:
        from qvla_export.report.run_data import read_run

        data = read_run(run)
        for path in robot_profiles:
            _take(run, data, path)
    return write_report(run)


def _take(run: Path, data: "RunData", path: Path) -> None:
    """Write a robot's file into the run folder, with what was predicted of its bundles."""
    from jetson.latency.robot_profile import RobotProfile
    from qvla_export.report.robots import FOLDER, FORMAT

    profile = RobotProfile.load(path)
    settings = {one.bundle_digest: one.name for one in data.settings}
    measured = {one.name: one.bundle_digest for one in profile.comparison.profiles}
    foreign = [name for name, digest in measured.items() if digest not in settings]
    if foreign:
        raise ArtifactMismatch(
            f"{path} measured {foreign}, which are no bundles of {run} (settings "
            f"{list(settings.values())}): give the run that they were copied from"
        )
    names = {name: settings[digest] for name, digest in measured.items()}
    predicted = {
        one.name: _predicted(run, data, one, names[one.name]) for one in profile.comparison.profiles
    }
    write_json(
        run / FOLDER / f"{path.stem}.json",
        {
            "format": FORMAT,
            "settings": names,
            "predicted": predicted,
            "profile": profile.to_json(),
        },
    )


def _predicted(
    run: Path, data: "RunData", profile: "LatencyProfile", setting: str
) -> dict[str, Any]:
    """Return what a roofline predicts of a setting on that board, or why it does not."""
    from engines.targets import find_target
    from qvla_export.pipeline.predict import Device, predict_action
    from qvla_export.pipeline.sizing.subject import subject_of_bundle

    quantized = [one.name for one in data.settings if one.plan is not None]
    weights = "plan" if setting in quantized else "float"
    if not quantized:
        return {"why_not": "no quantized bundle lists the policy's layers"}
    source = setting if weights == "plan" else quantized[0]
    mode = (profile.board_before.power_mode or "").removeprefix("MODE_")
    try:
        target = find_target(profile.target)
        if not mode and len(target.power_modes) > 1:
            return {"why_not": "the board's power mode is not known"}
        device = Device(target, mode or None, None)
        subject = subject_of_bundle(run / "settings" / source / "bundle")
        report = predict_action(subject, device)
    except QvlaError as error:
        return {"why_not": " ".join(str(error).split())}
    form = "float" if weights == "float" else report.today
    (row,) = (row for row in report.rows if row.form == form)
    return row.to_json() | {"rates": report.rates}

"""The step that draws the calibration set, from a data set or the simulator."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from calibration.sources.lerobot import LeRobotDataset


def chosen_tasks(names: str | None) -> tuple[str, ...]:
    """Return the tasks named in a comma-separated text; all where it is None.

    Raises:
        QvlaError: a name is unknown.
    """
    from calibration.benchmarks.metaworld.tasks import TASKS, find_task

    if names is None:
        return tuple(TASKS)
    return tuple(find_task(name.strip()).name for name in names.split(","))


def open_dataset(
    root: Path | None, cameras: Sequence[str] | None, state_column: str
) -> "LeRobotDataset | None":
    """Open a LeRobot data set under the policy's own camera names; None for the simulator.

    Raises:
        QvlaError: a camera is not of the form NAME=COLUMN, or the data set lacks a column.
    """
    if root is None:
        return None
    from calibration.sources.lerobot import KeyMap, LeRobotDataset

    pairs = [text.partition("=") for text in cameras or ()]
    if bad := [name for name, _, column in pairs if not name or not column]:
        raise QvlaError(
            f"--camera takes NAME=COLUMN, such as full_image=observation.images.front, got {bad}"
        )
    columns = {name: column for name, _, column in pairs}
    return LeRobotDataset(root, KeyMap(columns, state_column or None))

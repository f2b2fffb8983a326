"""Opening recorded demonstrations, as the options on a command line say."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from calibration.sources.base import DataSource


@dataclass(frozen=True)
class ColumnOptions:
    """Which columns of a data set are what, unparsed; the defaults are LeRobot's usual names."""

    # NAME=COLUMN: the policy's name of a camera, and the data set's column.
    cameras: tuple[str, ...] = ()
    # One column or several separated by commas; empty where there is none.
    state_column: str = "observation.state"
    action_column: str = "action"
    # A column of texts; None for the task that a row names.
    instruction_column: str | None = None
    # What to do in every frame, in words, whatever the recording says.
    instruction: str | None = None

    def columns_of_cameras(self) -> dict[str, str]:
        """Return the column of each camera that is named.

        Raises:
            QvlaError: one is not of the form NAME=COLUMN, or is named twice.
        """
        pairs = [text.partition("=") for text in self.cameras]
        if bad := [name for name, _, column in pairs if not name or not column]:
            raise QvlaError(
                "--camera takes NAME=COLUMN, such as full_image=observation.images.front, "
                f"got {bad}"
            )
        columns = {name: column for name, _, column in pairs}
        if len(columns) < len(pairs):
            raise QvlaError(f"--camera names a camera twice: {[name for name, _, _ in pairs]}")
        return columns


# What no option changes.
USUAL_COLUMNS = ColumnOptions()


def open_dataset(root: Path, columns: ColumnOptions = USUAL_COLUMNS) -> "DataSource":
    """Open a data set of any format, or one of the Hub's, under the policy's own camera names.

    Raises:
        QvlaError: an option is of another form, or the data set lacks a column.
        ArtifactError: the data set is damaged, or of a format that is not read.
    """
    from calibration.sources.formats import open_source
    from calibration.sources.hub_cache import find_dataset
    from calibration.sources.lerobot_columns import KeyMap

    keys = KeyMap(
        columns.columns_of_cameras(),
        columns.state_column or None,
        columns.action_column or None,
        columns.instruction_column or None,
        columns.instruction or None,
    )
    return open_source(find_dataset(root), keys)

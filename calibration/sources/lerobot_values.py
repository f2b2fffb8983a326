"""Values of a LeRobotDataset's rows: vectors, states that are finite, pictures' bytes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.sources.base import BadFrame
from calibration.sources.instruction_texts import text_of
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import whole_number

# What to do about a frame that cannot be used.
_SKIP = "mend it, or leave such frames out with --skip-bad-frames"
# Column and row of a table -> a text that says where that is.
Place = Callable[[int, str], str]


def read_vectors(table: Any, columns: Sequence[str], place: Place) -> NDArray[np.float32]:
    """Return columns of vectors or numbers side by side, null as NaN.  float32 [rows, dim]

    Raises:
        ArtifactError: a column holds no vectors of numbers of one length.
    """
    parts = [np.zeros((len(table), 0), dtype=np.float32)]
    for column in columns:
        values = table[column].to_pylist()
        whole = next((value for value in values if value is not None), math.nan)
        missing = np.full(np.shape(whole), np.nan)
        filled = [missing if value is None else value for value in values]
        try:
            # Texts of numbers would be taken for these.
            if np.asarray(filled).dtype.kind in "US":
                raise ValueError
            # What overflows float32 is infinite, which is refused where it matters.
            with np.errstate(over="ignore"):
                part = np.asarray(filled, dtype=np.float32)
        except (TypeError, ValueError):
            raise ArtifactError(
                f"{place(0, column)} holds no vectors of numbers of one length; name another one "
                "with --state-column or --action-column"
            ) from None
        parts.append(part.reshape(len(table), -1))
    return np.concatenate(parts, axis=1)


def read_states(table: Any, columns: Sequence[str], place: Place) -> NDArray[np.float32]:
    """Return the columns of the state side by side.  float32 [rows, dim]

    Raises:
        BadFrame: a number is null, NaN or infinite.
        ArtifactError: a column holds no vectors of numbers of one length.
    """
    states = read_vectors(table, columns, place)
    if columns and not states.shape[1]:
        raise ArtifactError(
            f"{place(0, ','.join(columns))} holds no numbers; name another one with "
            "--state-column, '' for a policy without a state"
        )
    bad = np.argwhere(~np.isfinite(states))
    if len(bad):
        row, number = (int(n) for n in bad[0])
        where = place(row, ",".join(columns))
        raise BadFrame(f"{where}: number {number} of the state is {states[row, number]}; {_SKIP}")
    return states


def read_instruction(value: Any, tasks: Mapping[int, str] | None, place: str) -> str:
    """Return what a row says is to be done.

    Args:
        value: a text, or the number of a task where there are tasks.
        tasks: instructions by number; None where the value is a text.
        place: names the row in an error.

    Raises:
        BadFrame: it is empty.
        ArtifactError: it is no text, or the number of no task.
    """
    # LeRobot writes one text; others a list of one.
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if tasks is not None:
        value = whole_number(value, place)
        if value not in tasks:
            raise ArtifactError(f"{place}: task_index {value} is not in meta/tasks")
        value = tasks[value]
    text = text_of(value, place)
    if not text.strip():
        raise BadFrame(f"{place}: the instruction is empty; {_SKIP}")
    return text


def picture_bytes(value: Any, place: str) -> bytes:
    """Return an image file's bytes.

    Raises:
        ArtifactError: the value holds none.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        path = value.get("path") if isinstance(value, dict) else None
        where = f" and only the path {path!r}" if path else ""
        raise ArtifactError(
            f"{place} holds no image bytes but {type(data).__name__}{where}; write the dataset "
            "with its pictures inside the parquet files"
        )
    return data

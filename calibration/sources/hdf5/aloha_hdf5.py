"""ALOHA's recordings: one HDF5 file an episode, `observations/images/...` and `qpos`.

Sources: ACT's `record_sim_episodes.py`; ALOHA's recorder, whose compressed pictures are JPEG files
padded with zeros to one length; others store them as byte strings of any length.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from calibration.sources.frame_source import Moment
from calibration.sources.hdf5.hdf5_episodes import Hdf5Source
from calibration.sources.hdf5.hdf5_file import Hdf5File
from calibration.sources.instruction_texts import text_of
from calibration.sources.source_columns import Offer

_IMAGES = "observations/images/"
_JPEG_END = b"\xff\xd9"
# Where recorders leave the task, if anywhere.
_ATTRIBUTES = ("language_instruction", "instruction", "task")
_ARRAYS = ("language_instruction", "language_raw", "instruction")


class AlohaHdf5(Hdf5Source):
    """The episodes of a folder's files, or one file; a `DataSource`."""

    format_name = "ALOHA HDF5"
    # Of ALOHA's control.
    fps = 50.0

    def groups_of(self, file: Hdf5File) -> list[str]:
        """Return the one episode that is the whole file."""
        return [""]

    def is_picture(self, name: str, rank: int) -> bool:
        """Whether it is a camera's: pixels, or files."""
        return name.startswith(_IMAGES) and rank in (1, 2, 4)

    def offer(self, pictures: Sequence[str], others: Sequence[str]) -> Offer:
        """Return the usual names: the joints' positions are the state."""
        return Offer(pictures, others, ("observations/qpos",), ("action",), ())

    def picture(self, moment: Moment, column: str) -> Any:
        """Return pixels uint8 [h, w, 3], or a file's bytes without what pads them."""
        value = self.row(moment, column)
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype == np.uint8:
            value = value.tobytes()
        if isinstance(value, bytes):
            end = value.rfind(_JPEG_END)
            return value[: end + 2] if value.startswith(b"\xff\xd8") and end > 0 else value
        return value

    def instruction(self, moment: Moment) -> str:
        """Return what an attribute or an array of one text says; ALOHA's recorder has neither."""
        file, _ = self.place_of(moment)
        if self.columns.instruction:
            whole = file.text(self.columns.instruction)
            if whole is not None:
                return whole
            value = self.row(moment, self.columns.instruction)
            return text_of(value, moment.column(self.columns.instruction))
        names = [*(f"@{name}" for name in _ATTRIBUTES), *_ARRAYS]
        return next((text for name in names if (text := file.text(name))), "")

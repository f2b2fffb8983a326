"""LIBERO's demonstrations: `data/demo_<k>/obs/...` in one HDF5 file a task.

Sources: LIBERO's `scripts/create_dataset.py`; OpenVLA-OFT's `regenerate_libero_dataset.py`, whose
files have no attributes, and its evaluation, which turns pictures by 180 degrees.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.sources.frame_source import Moment
from calibration.sources.hdf5.hdf5_episodes import Hdf5Source, natural
from calibration.sources.hdf5.hdf5_file import Hdf5File
from calibration.sources.source_columns import Offer
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import FOREIGN, Node, parse_document

_DATA = "data"
_SUFFIX = "_demo"


class LiberoHdf5(Hdf5Source):
    """The demonstrations of one task's file, or of all in a folder; a `DataSource`.

    Pictures are turned as OpenVLA-OFT sees them, in training and in evaluation.
    """

    format_name = "LIBERO HDF5"
    # Of the simulator's control.
    fps = 20.0

    def groups_of(self, file: Hdf5File) -> list[str]:
        """Return `data/demo_<k>` in natural order."""
        names = sorted(file.members(_DATA), key=natural)
        groups = [f"{_DATA}/{name}" for name in names if name.startswith("demo")]
        if not groups:
            raise ArtifactError(f"{file.path} holds no demonstrations data/demo_<k>")
        return groups

    def is_picture(self, name: str, rank: int) -> bool:
        """Whether it is a camera's: `obs/<camera>_rgb`."""
        return rank == 4 and name.startswith("obs/") and name.endswith("_rgb")

    def offer(self, pictures: Sequence[str], others: Sequence[str]) -> Offer:
        """Return the usual names: position, axis-angle and fingers are OpenVLA-OFT's state."""
        if not pictures and any(name.endswith("_image") for name in others):
            raise ArtifactError(
                f"{self.root} is robomimic's HDF5, which is not read: LIBERO's pictures are named "
                "<camera>_rgb. Write it as a LeRobotDataset"
            )
        states = ("ee_states,gripper_states", "ee_pos,ee_ori,gripper_states")
        return Offer(pictures, others, states, ("actions",))

    def picture(self, moment: Moment, column: str) -> NDArray[Any]:
        """Return pixels uint8 [h, w, 3], the right way up."""
        file, _ = self.place_of(moment)
        pixels = np.asarray(self.row(moment, column))
        convention = file.text(f"{_DATA}@macros_image_convention") or "opengl"
        if convention not in ("opengl", "opencv"):
            raise ArtifactError(
                f"{file.path}: macros_image_convention is opengl or opencv, got {convention!r:.40}"
            )
        # OpenCV's rows are the right way up already; both ways the sides are swapped.
        return pixels[:, ::-1] if convention == "opencv" else pixels[::-1, ::-1]

    def instruction(self, moment: Moment) -> str:
        """Return `problem_info`'s instruction, or what the file's name says."""
        file, place = self.place_of(moment)
        if self.columns.instruction:
            return file.text(f"{place.group}/{self.columns.instruction}") or ""
        problem = file.text(f"{_DATA}@problem_info")
        if problem is None:
            return instruction_of_name(file.path)
        where = f"{file.path}, attribute problem_info"
        info = Node(parse_document(problem, f"{where} is not valid JSON", FOREIGN), where)
        task = info.field("language_instruction")
        # Some releases wrap it in a list.
        parts = task.elements() if isinstance(task.value, list) else [task]
        return "".join(part.text() for part in parts)


def instruction_of_name(path: Path) -> str:
    """Return the task that a file's name says: KITCHEN_SCENE1_open_the_drawer_demo.hdf5."""
    if not path.stem.endswith(_SUFFIX):
        return ""
    words = path.stem.removesuffix(_SUFFIX).split("_")
    scenes = [number for number, word in enumerate(words) if "SCENE" in word]
    return " ".join(words[scenes[-1] + 1 if scenes else 0 :])

"""CALVIN: one npz file a frame, and instructions as JSON; the pickled annotations are never loaded.

Source: CALVIN's `dataset/README.md`. Both ends of an episode, and of an annotated stretch, count.
"""

import logging
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from calibration.sources.frame_source import FrameSource, Moment
from calibration.sources.lerobot_columns import KeyMap
from calibration.sources.numpy_files import npz_members, read_npy, read_npz
from calibration.sources.source_columns import Offer, choose_columns
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import FOREIGN, Node, read_json

_ENDS = "ep_start_end_ids.npy"
_PICKLED = "lang_annotations/auto_lang_ann.npy"
ANNOTATIONS = "lang_annotations.json"
_MOST_FRAMES = 100_000_000
_LOG = logging.getLogger(__name__)
# First frame, length and instruction of an episode.
_Span = tuple[int, int, str]


class CalvinNpz(FrameSource):
    """The annotated stretches of a folder, or its episodes under one instruction.

    Raises:
        ArtifactError: a file is missing or damaged, or nothing says what to do.
        QvlaError: a column is not there.
    """

    format_name = "CALVIN npz"
    fps = 30.0

    def __init__(self, root: Path, keys: KeyMap | None = None) -> None:
        self.root = root
        keys = keys or KeyMap()
        if keys.instruction:
            raise ArtifactError(
                f"{root} is CALVIN, whose frames hold no instruction {keys.instruction}; put "
                f"{ANNOTATIONS} beside them, or give --instruction TEXT"
            )
        # First frame, length and instruction of each episode.
        self._spans = self._whole_episodes() if keys.one_instruction else self._annotated()
        if not self._spans:
            raise ArtifactError(f"{root} has no episodes; give a folder that has some")
        self.episode_lengths = tuple(length for _, length, _ in self._spans)
        names = npz_members(self._path(self._spans[0][0]))
        pictures = [name for name in names if name.startswith("rgb_")]
        others = [name for name in names if name not in pictures]
        offer = Offer(pictures, others, ("robot_obs",), ("rel_actions",))
        self.columns = choose_columns(keys, offer, str(root))

    def picture(self, moment: Moment, column: str) -> Any:
        """Return pixels uint8 [h, w, 3]."""
        return self.vector(moment, column)

    def vector(self, moment: Moment, column: str) -> Any:
        """Return an array of a frame's file."""
        return read_npz(self._path(self._spans[moment.episode][0] + moment.frame), column)

    def instruction(self, moment: Moment) -> str:
        """Return what is annotated."""
        return self._spans[moment.episode][2]

    def files(self) -> Iterable[Path]:
        """Return what says which frames belong together, and the first frame: of millions."""
        paths = (self.root / _ENDS, self.root / ANNOTATIONS, self._path(self._spans[0][0]))
        return [path for path in paths if path.is_file()]

    def _path(self, frame: int) -> Path:
        return self.root / f"episode_{frame:07d}.npz"

    def _whole_episodes(self) -> list[_Span]:
        path = self.root / _ENDS
        ends = read_npy(path)
        if ends.ndim != 2 or ends.shape[1] != 2 or ends.dtype.kind not in "iu":
            raise ArtifactError(
                f"{path} must hold whole numbers [episodes, 2], got {ends.dtype} "
                f"{list(ends.shape)}; copy the file again"
            )
        return [
            self._span(int(first), int(last), "", f"{path}, row {row}")
            for row, (first, last) in enumerate(ends)
        ]

    def _annotated(self) -> list[_Span]:
        path = self.root / ANNOTATIONS
        if not path.exists():
            raise ArtifactError(self._advice())
        document = Node(read_json(path, "annotations", FOREIGN), str(path))
        spans = [
            self._span(
                one.field("start").whole(),
                one.field("end").whole(),
                one.field("instruction").text() if one.has("instruction") else "",
                one.place,
            )
            for one in document.elements()
        ]
        apart = _apart(spans)
        if len(apart) < len(spans):
            _LOG.warning(
                "%s: %d of %d stretches begin inside another one and are left out: a frame must "
                "not be measured on and judged by",
                *(path, len(spans) - len(apart), len(spans)),
            )
        return apart

    def _span(self, first: int, last: int, text: str, place: str) -> _Span:
        if not 0 <= first <= last < _MOST_FRAMES:
            raise ArtifactError(f"{place}: an episode from frame {first} to {last} is none")
        return first, last - first + 1, text

    def _advice(self) -> str:
        """Return what to do about instructions, which CALVIN ships as a pickle."""
        if not (self.root / _PICKLED).exists():
            return (
                f"{self.root} is CALVIN and has no {ANNOTATIONS}; say what to do with "
                "--instruction TEXT, or put a list of {start, end, instruction} there"
            )
        code = (
            f"import json, numpy; a = numpy.load('{_PICKLED}', allow_pickle=True).item(); "
            "json.dump([{'start': int(s), 'end': int(e), 'instruction': t} for (s, e), t in "
            f"zip(a['info']['indx'], a['language']['ann'])], open('{ANNOTATIONS}', 'w'))"
        )
        return (
            f"{self.root / _PICKLED} is a pickle, which runs whatever its writer put in it and is "
            f"never loaded here. If you trust it, convert it once: cd {shlex.quote(str(self.root))}"
            f' && python -c "{code}"'
        )


def _apart(spans: list[_Span]) -> list[_Span]:
    """Return stretches in the order of their frames, without those that begin inside another."""
    apart: list[_Span] = []
    for first, length, text in sorted(spans, key=lambda span: span[:2]):
        if not apart or first >= apart[-1][0] + apart[-1][1]:
            apart.append((first, length, text))
    return apart

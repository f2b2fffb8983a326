"""Pictures in a folder, and JSON that lists them: calib.jsonl of the official QVLA code, and ours.

    calib.jsonl      {"text": "open the drawer", "image": "img/0.png"}
    frames.jsonl     {"instruction": ..., "images": {"full_image": "a/0.png", ...},
                      "state": [...], "action": [...], "episode": 0}
    frames.json      a list of such objects

Paths are relative to the JSON file. Rows of one `episode` follow each other; a row without one is
an episode of its own. State and action may be absent, from all rows alike: what one row has, each
that is drawn needs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.sources.data_paths import path_inside, visible
from calibration.sources.frame_source import FrameSource, Moment
from calibration.sources.lerobot_columns import KeyMap
from calibration.sources.source_columns import Offer, choose_columns
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import FOREIGN, Node, read_bounded, read_json, read_lines

LISTS = ("frames.jsonl", "frames.json", "*calib*.jsonl")
_ONE_IMAGE = "image"
_INSTRUCTIONS = ("instruction", "text")
_MOST_PICTURE_BYTES = 256 << 20


@dataclass(frozen=True)
class _Row:
    node: Node
    # Camera -> path of its picture.
    images: dict[str, str]


class PictureList(FrameSource):
    """The rows of one JSON file; a `DataSource`.

    Raises:
        ArtifactError: the file is damaged, or a row contradicts the first.
        QvlaError: a camera is not there.
    """

    format_name = "list of pictures"
    # Nothing says; it only spaces timestamps.
    fps = 10.0

    def __init__(self, root: Path, keys: KeyMap | None = None) -> None:
        self.root = root
        self._path = list_file(root)
        rows = [_row(node) for node in _nodes(self._path)]
        if not rows:
            raise ArtifactError(f"{self._path} lists no pictures; give a list of some")
        self._episodes = _episodes(rows)
        self.episode_lengths = tuple(map(len, self._episodes))
        # What only some rows have is there as well: others are refused where they are drawn.
        fields = dict.fromkeys(name for row in rows for name in row.node.fields())
        others = [name for name in fields if name not in ("image", "images")]
        cameras = dict.fromkeys(name for row in rows for name in row.images)
        offer = Offer(list(cameras), others, ("state",), ("action",), _INSTRUCTIONS)
        self.columns = choose_columns(keys or KeyMap(), offer, str(root))

    def picture(self, moment: Moment, column: str) -> bytes:
        """Return a file's bytes."""
        row = self._row(moment)
        if column not in row.images:
            raise ArtifactError(f"{row.node.place}: no picture of {column} is listed; list it")
        path = path_inside(self._path.parent, row.images[column], moment.column(column))
        return read_bounded(path, f"{moment.column(column)}: picture", _MOST_PICTURE_BYTES)

    def vector(self, moment: Moment, column: str) -> Any:
        """Return numbers; null is NaN."""
        field = self._row(moment).node.field(column)
        return field.numbers(non_finite=True) if field.value is not None else [float("nan")]

    def instruction(self, moment: Moment) -> str:
        """Return what a row says."""
        node, column = self._row(moment).node, self.columns.instruction
        return node.field(column).text() if column and node.has(column) else ""

    def files(self) -> Iterable[Path]:
        """Return the list; pictures count where they are drawn."""
        return [self._path]

    def _row(self, moment: Moment) -> _Row:
        return self._episodes[moment.episode][moment.frame]


def list_file(root: Path) -> Path:
    """Return a file, or the one in a folder that lists pictures.

    Raises:
        ArtifactError: there are several.
    """
    if root.is_file():
        return root
    paths = [path for pattern in LISTS for path in visible(root.glob(pattern))]
    if len(paths) != 1:
        raise ArtifactError(
            f"{root} holds {len(paths)} lists of pictures; give one of them: "
            f"{', '.join(map(str, paths)) or ', '.join(LISTS)}"
        )
    return paths[0]


def _nodes(path: Path) -> Iterable[Node]:
    if path.suffix == ".json":
        yield from Node(read_json(path, "list of pictures", FOREIGN), str(path)).elements()
    else:
        for number, row in read_lines(path, "list of pictures", FOREIGN):
            yield Node(row, f"{path}, line {number}")


def _row(node: Node) -> _Row:
    if node.has("images"):
        images = {name: inner.text() for name, inner in node.field("images").fields().items()}
    else:
        images = {_ONE_IMAGE: node.field("image").text()}
    if wrong := [path for path in images.values() if "\0" in path]:
        raise node.wrong(f"paths have no zero byte, {wrong[0]!r:.40} does; and an object is needed")
    if len(set(images.values())) < len(images):
        raise node.wrong("each camera has a picture of its own")
    return _Row(node, images)


def _episodes(rows: list[_Row]) -> list[list[_Row]]:
    episodes: list[list[_Row]] = []
    before: int | None = None
    numbers: set[int] = set()
    for row in rows:
        number = row.node.field("episode").whole() if row.node.has("episode") else None
        if number is not None and number == before:
            episodes[-1].append(row)
        elif number in numbers:
            # Its frames would be held out from themselves.
            raise ArtifactError(
                f"{row.node.place}: episode {number} has ended before; put its rows one after "
                "another"
            )
        else:
            episodes.append([row])
        before = number
        numbers |= set() if number is None else {number}
    return episodes

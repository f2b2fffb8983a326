"""Reading LeRobotDatasets v3.0, v2.1 and v2.0, ours and others', without loading them whole."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.sources.base import BadFrame, Frame
from calibration.sources.image_codec import decode_png
from calibration.sources.lerobot_columns import KeyMap as KeyMap
from calibration.sources.lerobot_columns import number_names, resolve_columns, split_columns
from calibration.sources.lerobot_metadata import (
    EpisodeSpan,
    read_episodes,
    read_info,
    read_tasks,
    whole_number,
)
from calibration.sources.lerobot_writer import Episode
from calibration.sources.parquet_rows import ParquetRows
from calibration.sources.row_places import RowPlaces
from qvla_export.shared.artifacts import sha256_tree
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.observation import Observation

_COUNTERS = ("timestamp", "frame_index", "episode_index", "index")
_TASK = "task_index"
_SKIP = "mend it, or leave such frames out with --skip-bad-frames"


class LeRobotDataset:
    """A dataset on disk, also indexed by global frame number; a `DataSource`.

    Raises:
        ArtifactError: a file is missing, damaged or of another version.
        QvlaError: a key is not among the dataset's, or its images are videos.
    """

    def __init__(self, root: Path, keys: KeyMap | None = None) -> None:
        self.root = root
        info = read_info(root)
        self.fps = float(info["fps"])
        self.features: Mapping[str, Any] = info["features"]
        self.keys = resolve_columns(keys or KeyMap(), self.features)
        # Task index -> instruction; empty where a column of texts says what to do.
        self.tasks = {} if self.keys.instruction else read_tasks(root)
        self.episodes = read_episodes(root, info)
        self._starts = np.array([span.start for span in self.episodes])
        self._states = split_columns(self.keys.state)
        self._actions = split_columns(self.keys.action)
        columns = [*self.keys.images.values(), *self._actions, *self._states, *_COUNTERS]
        self._rows = ParquetRows(root, list(dict.fromkeys([*columns, self._instructions])))
        self._places = RowPlaces(root)
        # Camera -> size of its first picture, and where that was.
        self._sizes: dict[str, tuple[tuple[int, ...], str]] = {}

    def __len__(self) -> int:
        return self.episodes[-1].stop

    def __getitem__(self, index: int) -> Frame:
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        span = self.episodes[int(np.searchsorted(self._starts, index, side="right")) - 1]
        return self._frame(self._read(span, index, index + 1), span, index - span.start)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the images in every frame."""
        return tuple(self.keys.images)

    @property
    def episode_lengths(self) -> tuple[int, ...]:
        """Number of frames in each episode."""
        return tuple(span.stop - span.start for span in self.episodes)

    def width(self, columns: str | None) -> int:
        """Return how many numbers one column, or several separated by commas, have in a frame.

        Raises:
            ArtifactError: a feature's shape is no list of whole numbers.
        """
        widths = []
        for column in split_columns(columns):
            place = f"{self.root}/meta/info.json, shape of {column}"
            feature = self.features[column]
            shape = feature.get("shape") if isinstance(feature, dict) else None
            sides = shape if isinstance(shape, list) else [shape]
            widths.append(math.prod(whole_number(side, place) for side in sides))
        return sum(widths)

    def frame(self, episode: int, frame: int) -> Frame:
        """Read one frame of an episode.

        Raises:
            IndexError: there is no such episode or frame.
            ArtifactError: the dataset is damaged.
        """
        span = self._span(episode)
        if not 0 <= frame < span.stop - span.start:
            raise IndexError(f"frame {frame} of {span.stop - span.start}")
        return self[span.start + frame]

    def frames(self, episode: int) -> Iterator[Frame]:
        """Yield the frames of one episode in order."""
        span = self._span(episode)
        for index in range(span.start, span.stop):
            yield self[index]

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of an action's numbers; empty where the features do not tell them apart."""
        return number_names(self.features, self._actions)

    def actions(self, episode: int, start: int, stop: int) -> NDArray[np.float32]:
        """Read the actions of frames [start, stop) of an episode, no pictures.

        Null is NaN.  float32 [n, dim], dim 0 where the dataset has no actions.

        Raises:
            IndexError: there is no such episode or frame.
            ArtifactError: the dataset is damaged.
        """
        span = self._span(episode)
        if not 0 <= start < stop <= span.stop - span.start:
            raise IndexError(f"frames {start}..{stop} of {span.stop - span.start}")
        if not self._actions:
            return np.zeros((stop - start, 0), np.float32)
        table = self._read(span, span.start + start, span.start + stop)
        return self._matrix(table, self._actions, span, start)

    def identity(self) -> dict[str, Any]:
        """Return name, digest of the metadata and the columns used."""
        texts = {"instruction": self.keys.instruction} if self.keys.instruction else {}
        files = (p for p in (self.root / "meta").rglob("*") if p.is_file())
        names = (path.relative_to(self.root).as_posix() for path in files)
        return {
            "dataset": self.root.resolve().name,
            "dataset_digest": sha256_tree(self.root, names),
            "columns": {**self.keys.images, "state": self.keys.state} | texts,
        }

    def episode(self, episode: int) -> Episode:
        """Return one episode whole, its images still compressed."""
        span = self._span(episode)
        table = self._read(span, span.start, span.stop)
        images = {
            name: [
                _picture(value, self._place(span, row, column))
                for row, value in enumerate(table[column].to_pylist())
            ]
            for name, column in self.keys.images.items()
        }
        instructions = [self._instruction(table, row, span, row) for row in range(len(table))]
        several = len(set(instructions)) > 1
        state = self._matrix(table, self._states, span, 0)
        _require_finite(state, lambda row: self._place(span, row, str(self.keys.state)))
        action = self._matrix(table, self._actions, span, 0)
        phrases = tuple(instructions) if several else ()
        return Episode(instructions[0], images, state, action, phrases)

    def close(self) -> None:
        """Close the open file; reading again reopens it."""
        self._rows.close()

    def _span(self, episode: int) -> EpisodeSpan:
        if not 0 <= episode < len(self.episodes):
            raise IndexError(f"episode {episode} of {len(self.episodes)}")
        return self.episodes[episode]

    def _read(self, span: EpisodeSpan, start: int, stop: int) -> Any:
        """Return the rows of global frames [start, stop), wherever they are."""
        if span.file is None:
            places = [self._places.of_index(index) for index in range(start, stop)]
        else:
            frames = range(start - span.start, stop - span.start)
            places = [self._places.of_frame(span.file, frame) for frame in frames]
        table = self._rows.read_places(places)
        for row, value in enumerate(table["episode_index"].to_pylist()):
            place = self._place(span, start - span.start + row, "episode_index")
            if whole_number(value, place) != span.index:
                raise ArtifactError(
                    f"{place}: the row is of episode {value}; meta/episodes and data do not "
                    "belong together"
                )
        return table

    @property
    def _instructions(self) -> str:
        return self.keys.instruction or _TASK

    def _place(self, span: EpisodeSpan, frame: int, column: str) -> str:
        return f"{self.root}, episode {span.index}, frame {frame}, column {column}"

    def _frame(self, table: Any, span: EpisodeSpan, frame: int) -> Frame:
        images = {
            name: self._image(name, table[column][0].as_py(), self._place(span, frame, column))
            for name, column in self.keys.images.items()
        }
        state = self._matrix(table, self._states, span, frame)
        _require_finite(state, lambda _: self._place(span, frame, str(self.keys.state)))
        timestamp = table["timestamp"][0].as_py()
        return Frame(
            Observation(images, self._instruction(table, 0, span, frame), state[0]),
            self._matrix(table, self._actions, span, frame)[0],
            span.index,
            frame,
            float(timestamp) if isinstance(timestamp, int | float) else frame / self.fps,
        )

    def _image(self, camera: str, value: Any, place: str) -> NDArray[np.uint8]:
        data = _picture(value, place)
        try:
            image = decode_png(data)
        except ArtifactError as error:
            raise ArtifactError(f"{place}: {error}") from None
        size, first = self._sizes.setdefault(camera, (image.shape, place))
        if image.shape != size:
            raise ArtifactError(
                f"{place}: the picture is {image.shape[0]} x {image.shape[1]}, but {first} has "
                f"{size[0]} x {size[1]}; bring all pictures of a camera to one size"
            )
        return image

    def _instruction(self, table: Any, row: int, span: EpisodeSpan, frame: int) -> str:
        place = self._place(span, frame, self._instructions)
        value = table[self._instructions][row].as_py()
        if self.keys.instruction is None:
            value = whole_number(value, place)
            if value not in self.tasks:
                raise ArtifactError(f"{place}: task_index {value} is not in meta/tasks")
            value = self.tasks[value]
        if value is not None and not isinstance(value, str):
            raise ArtifactError(f"{place}: an instruction is a text, got {type(value).__name__}")
        if not value or not value.strip():
            raise BadFrame(f"{place}: the instruction is empty; {_SKIP}")
        return value

    def _matrix(
        self, table: Any, columns: tuple[str, ...], span: EpisodeSpan, frame: int
    ) -> NDArray[np.float32]:
        """Return columns of vectors or numbers side by side, null as NaN.  float32 [rows, dim]"""
        parts = [np.zeros((len(table), 0), dtype=np.float32)]
        for column in columns:
            values = table[column].to_pylist()
            whole = next((value for value in values if value is not None), math.nan)
            missing = np.full(np.shape(whole), np.nan)
            filled = [missing if value is None else value for value in values]
            try:
                # What overflows float32 is infinite, which is refused where it matters.
                with np.errstate(over="ignore"):
                    part = np.asarray(filled, dtype=np.float32)
            except (TypeError, ValueError):
                place = self._place(span, frame, column)
                raise ArtifactError(f"{place} holds no vectors of numbers of one length") from None
            parts.append(part.reshape(len(table), -1))
        return np.concatenate(parts, axis=1)


def _picture(value: Any, place: str) -> bytes:
    """Return an image file's bytes."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        path = value.get("path") if isinstance(value, dict) else None
        where = f" and only the path {path!r}" if path else ""
        raise ArtifactError(
            f"{place} holds no image bytes but {type(data).__name__}{where}; write the dataset "
            "with its pictures inside the parquet files"
        )
    return data


def _require_finite(states: NDArray[np.float32], place: Callable[[int], str]) -> None:
    bad = np.argwhere(~np.isfinite(states))
    if len(bad):
        row, number = (int(n) for n in bad[0])
        raise BadFrame(
            f"{place(row)}: number {number} of the state is {states[row, number]}; {_SKIP}"
        )

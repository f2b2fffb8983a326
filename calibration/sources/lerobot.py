"""Reading LeRobotDatasets v3.0, v2.1 and v2.0, ours and others', without loading them whole."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.sources.base import Frame, OneWidth
from calibration.sources.hub_cache import name_of_dataset
from calibration.sources.lerobot_cameras import Cameras, RowOfEpisode
from calibration.sources.lerobot_columns import KeyMap as KeyMap
from calibration.sources.lerobot_columns import (
    is_whole,
    number_names,
    resolve_columns,
    split_columns,
)
from calibration.sources.lerobot_metadata import EpisodeSpan, read_episodes, read_info, read_tasks
from calibration.sources.lerobot_rows import EpisodeRows
from calibration.sources.lerobot_values import Place, read_instruction, read_states, read_vectors
from calibration.sources.lerobot_writer import Episode
from qvla_export.shared.artifacts import sha256_tree
from qvla_export.shared.json_documents import whole_number
from qvla_export.shared.observation import Observation

_COUNTERS = ("timestamp", "frame_index", "episode_index", "index")
_TASK = "task_index"
_ANNOTATION = "annotation."
# Of a column that info.json need not name.
_NUMBERED = {"dtype": "int64"}


class LeRobotDataset:
    """A dataset on disk, also indexed by global frame number; a `DataSource`.

    Raises:
        ArtifactError: a file is missing, damaged or of another version.
        QvlaError: a key is not among the dataset's.
    """

    def __init__(self, root: Path, keys: KeyMap | None = None) -> None:
        self.root = root
        info = read_info(root)
        self.fps = float(info["fps"])
        self.features: Mapping[str, Any] = info["features"]
        self.keys = resolve_columns(keys or KeyMap(), self.features)
        # Task index -> instruction; empty where a column of texts or an option says what to do.
        said = self.keys.one_instruction or self._has_texts()
        self.tasks = {} if said else read_tasks(root)
        self._cameras = Cameras(root, self.fps, self.keys.images, self.features)
        self.episodes = read_episodes(root, info, self._cameras.videos)
        self._starts = np.array([span.start for span in self.episodes])
        self._states = split_columns(self.keys.state)
        self._actions = split_columns(self.keys.action)
        columns = [*self._cameras.stored, *self._actions, *self._states, *_COUNTERS]
        # Rows that were announced and not read yet, by episode and frame.
        self._ahead: dict[tuple[int, int], RowOfEpisode] = {}
        columns += [] if self.keys.one_instruction else [self.keys.instruction or _TASK]
        self._rows = EpisodeRows(root, columns)
        self._width = OneWidth()

    def __len__(self) -> int:
        return self.episodes[-1].stop

    def __getitem__(self, index: int) -> Frame:
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        episode = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._frame(self._row(episode, index - self.episodes[episode].start))

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the images in every frame."""
        return tuple(self.keys.images)

    @property
    def episode_lengths(self) -> tuple[int, ...]:
        """Number of frames in each episode."""
        return tuple(map(len, self.episodes))

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
        place = (episode, frame)
        return self._frame(self._ahead.pop(place) if place in self._ahead else self._row(*place))

    def check(self, episode: int, frame: int) -> None:
        """Look whether a frame has a usable state and instruction, without decoding pictures.

        Raises:
            BadFrame: its state is not finite, or its instruction is empty.
            ArtifactError: the dataset is damaged.
        """
        self._state_and_instruction(self._row(episode, frame))

    def expect(self, places: Iterable[tuple[int, int]]) -> None:
        """Say which frames of which episodes will be read, so that no video is decoded twice.

        Raises:
            ArtifactError: the dataset is damaged, or a video ends before its rows.
        """
        if self._cameras.videos:
            self._ahead = {place: self._row(*place).alone() for place in sorted(set(places))}
            self._cameras.expect(self._ahead.values())

    def frames(self, episode: int) -> Iterator[Frame]:
        """Yield the frames of one episode in order."""
        for frame in range(len(self._span(episode))):
            yield self.frame(episode, frame)

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
        if not 0 <= start < stop <= len(span):
            raise IndexError(f"frames {start}..{stop} of {len(span)}")
        if not self._actions:
            return np.zeros((stop - start, 0), np.float32)
        table = self._rows.read(span, start, stop)
        return read_vectors(table, self._actions, self._places(span, start))

    def identity(self) -> dict[str, Any]:
        """Return name, digest of the metadata and the columns used."""
        texts = {"instruction": self.keys.instruction} if self.keys.instruction else {}
        phrase = {"instruction": self.keys.one_instruction} if self.keys.one_instruction else {}
        files = (p for p in (self.root / "meta").rglob("*") if p.is_file())
        names = (path.relative_to(self.root).as_posix() for path in files)
        return {
            "dataset": name_of_dataset(self.root),
            "dataset_digest": sha256_tree(self.root, names),
            "columns": {**self.keys.images, "state": self.keys.state} | texts,
        } | phrase

    def episode(self, episode: int) -> Episode:
        """Return one episode whole, its images still compressed."""
        span = self._span(episode)
        table = self._rows.read(span, 0, len(span))
        rows = [RowOfEpisode(table, frame, span, frame) for frame in range(len(span))]
        images = {
            name: [self._cameras.compressed(row, name) for row in rows] for name in self.cameras
        }
        instructions = self._instructions(table, span, 0)
        several = len(set(instructions)) > 1
        state = read_states(table, self._states, self._places(span, 0))
        action = read_vectors(table, self._actions, self._places(span, 0))
        phrases = tuple(instructions) if several else ()
        return Episode(instructions[0], images, state, action, phrases)

    def close(self) -> None:
        """Close open files; reading again reopens them."""
        self._rows.close()
        self._cameras.close()
        self._ahead.clear()

    def _span(self, episode: int) -> EpisodeSpan:
        if not 0 <= episode < len(self.episodes):
            raise IndexError(f"episode {episode} of {len(self.episodes)}")
        return self.episodes[episode]

    def _row(self, episode: int, frame: int) -> RowOfEpisode:
        span = self._span(episode)
        if not 0 <= frame < len(span):
            raise IndexError(f"frame {frame} of {len(span)}")
        return RowOfEpisode(self._rows.read(span, frame, frame + 1), 0, span, frame)

    def _frame(self, row: RowOfEpisode) -> Frame:
        state, instruction = self._state_and_instruction(row)
        timestamp = row.table["timestamp"][0].as_py()
        return Frame(
            Observation(self._cameras.images(row), instruction, state),
            read_vectors(row.table, self._actions, self._places(row.span, row.frame))[0],
            row.span.index,
            row.frame,
            float(timestamp) if isinstance(timestamp, int | float) else row.frame / self.fps,
        )

    def _state_and_instruction(self, row: RowOfEpisode) -> tuple[NDArray[np.float32], str]:
        place = self._places(row.span, row.frame)
        state = read_states(row.table, self._states, place)[0]
        self._width.require(len(state), place(0, ",".join(self._states)))
        return state, self._instructions(row.table, row.span, row.frame)[0]

    def _instructions(self, table: Any, span: EpisodeSpan, first: int) -> list[str]:
        if self.keys.one_instruction:
            return [self.keys.one_instruction] * len(table)
        column = self.keys.instruction or _TASK
        tasks = None if self._has_texts() else self.tasks
        place = self._places(span, first)
        values = enumerate(table[column].to_pylist())
        return [read_instruction(value, tasks, place(row, column)) for row, value in values]

    def _has_texts(self) -> bool:
        """Whether a column of texts is named; GR00T's annotations are numbers of tasks."""
        column = self.keys.instruction or _TASK
        numbers = column == _TASK or column.startswith(_ANNOTATION)
        return not (numbers and is_whole(self.features.get(column, _NUMBERED)))

    def _places(self, span: EpisodeSpan, first: int) -> Place:
        """Return what says where values are of a table whose first row is a frame."""
        return lambda row, column: span.place(self.root, first + row, column)

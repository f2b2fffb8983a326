"""Reading LeRobotDataset v3.0, ours and others', without loading it whole."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.sources.base import Frame
from calibration.sources.image_codec import decode_png
from calibration.sources.lerobot_writer import (
    ACTION_KEY,
    CODEBASE_VERSION,
    STATE_KEY,
    TASKS_PATH,
    Episode,
)
from calibration.sources.parquet_rows import ParquetRows, read_parquet
from qvla_export.shared.artifacts import read_json, require_fields, sha256_tree
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.observation import Observation

_INFO_FIELDS = ("codebase_version", "fps", "features", "total_episodes", "total_frames")
_EPISODE_COLUMNS = (
    "episode_index",
    "data/chunk_index",
    "data/file_index",
    "dataset_from_index",
    "dataset_to_index",
)


@dataclass(frozen=True)
class KeyMap:
    """Where a dataset keeps what we need; the defaults are LeRobot's usual names."""

    # Camera name -> column.  Empty: every image column, named by the last part of its key.
    images: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    # None for a dataset without proprioception.
    state: str | None = STATE_KEY
    action: str = ACTION_KEY


@dataclass(frozen=True)
class EpisodeSpan:
    """Where an episode's frames are."""

    # Episode number.
    index: int
    # Global frame indices [start, stop).
    start: int
    stop: int
    # The parquet file relative to the dataset's root, and the frame its first row holds.
    file: str
    file_start: int


class LeRobotDataset:
    """A dataset on disk, also indexed by global frame number; a `DataSource`.

    Raises:
        ArtifactError: a file is missing, damaged or of another version.
        QvlaError: a key is not among the dataset's, or its images are videos.
    """

    def __init__(self, root: Path, keys: KeyMap | None = None) -> None:
        self.root = root
        info = _read_info(root)
        self.fps = float(info["fps"])
        self.features: Mapping[str, Any] = info["features"]
        self.keys = _resolve(keys or KeyMap(), self.features)
        # Task index -> instruction.
        self.tasks = _read_tasks(root)
        self.episodes = _read_episodes(root, info)
        self._starts = np.array([span.start for span in self.episodes])
        vectors = [self.keys.action] + ([self.keys.state] if self.keys.state else [])
        counters = ["timestamp", "frame_index", "episode_index", "index", "task_index"]
        columns = [*self.keys.images.values(), *vectors, *counters]
        self._rows = ParquetRows(root, columns)

    def __len__(self) -> int:
        return self.episodes[-1].stop

    def __getitem__(self, index: int) -> Frame:
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        span = self.episodes[int(np.searchsorted(self._starts, index, side="right")) - 1]
        return self._frame(self._read(span, index, index + 1))

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the images in every frame."""
        return tuple(self.keys.images)

    @property
    def episode_lengths(self) -> tuple[int, ...]:
        """Number of frames in each episode."""
        return tuple(span.stop - span.start for span in self.episodes)

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

    def identity(self) -> dict[str, Any]:
        """Return name, digest of the metadata and the columns used."""
        files = (p for p in (self.root / "meta").rglob("*") if p.is_file())
        names = (path.relative_to(self.root).as_posix() for path in files)
        return {
            "dataset": self.root.resolve().name,
            "dataset_digest": sha256_tree(self.root, names),
            "columns": {**self.keys.images, "state": self.keys.state},
        }

    def episode(self, episode: int) -> Episode:
        """Return one episode whole, its images still compressed."""
        span = self._span(episode)
        table = self._read(span, span.start, span.stop)
        images = {
            name: [_image_bytes(value) for value in table[column].to_pylist()]
            for name, column in self.keys.images.items()
        }
        instructions = [self._instruction(table, row) for row in range(table.num_rows)]
        several = len(set(instructions)) > 1
        return Episode(
            instructions[0],
            images,
            _matrix(table, self.keys.state),
            _matrix(table, self.keys.action),
            tuple(instructions) if several else (),
        )

    def close(self) -> None:
        """Close the open file; reading again reopens it."""
        self._rows.close()

    def _span(self, episode: int) -> EpisodeSpan:
        if not 0 <= episode < len(self.episodes):
            raise IndexError(f"episode {episode} of {len(self.episodes)}")
        return self.episodes[episode]

    def _read(self, span: EpisodeSpan, start: int, stop: int) -> Any:
        table = self._rows.read(span.file, start - span.file_start, stop - span.file_start)
        found = table["index"][0].as_py()
        if found != start:
            raise ArtifactError(
                f"{self.root / span.file}: the row of frame {start} holds frame {found}; "
                "meta/episodes and data do not belong together"
            )
        return table

    def _frame(self, table: Any) -> Frame:
        images = {
            name: decode_png(_image_bytes(table[column][0].as_py()))
            for name, column in self.keys.images.items()
        }
        state = _matrix(table, self.keys.state)[0]
        return Frame(
            Observation(images, self._instruction(table, 0), state),
            _matrix(table, self.keys.action)[0],
            table["episode_index"][0].as_py(),
            table["frame_index"][0].as_py(),
            table["timestamp"][0].as_py(),
        )

    def _instruction(self, table: Any, row: int) -> str:
        task = table["task_index"][row].as_py()
        if task not in self.tasks:
            raise ArtifactError(f"task_index {task} is not in {self.root / TASKS_PATH}")
        return self.tasks[task]


def _read_info(root: Path) -> dict[str, Any]:
    info = read_json(root / "meta/info.json", "LeRobot dataset info")
    if not isinstance(info, dict):
        raise ArtifactError(f"{root}/meta/info.json holds no JSON object")
    require_fields(info, _INFO_FIELDS, f"{root}/meta/info.json")
    if info["codebase_version"] != CODEBASE_VERSION:
        raise ArtifactError(
            f"{root} is a LeRobotDataset {info['codebase_version']}, this reads "
            f"{CODEBASE_VERSION}; its convert_dataset_v21_to_v30 script converts it"
        )
    return info


def _resolve(keys: KeyMap, features: Mapping[str, Any]) -> KeyMap:
    visual = {
        key: feature["dtype"]
        for key, feature in features.items()
        if feature["dtype"] in ("image", "video")
    }
    images = dict(keys.images) or {key.rsplit(".", 1)[-1]: key for key in visual}
    wanted = [*images.values(), keys.action] + ([keys.state] if keys.state else [])
    missing = [key for key in wanted if key not in features]
    if missing or not images:
        raise QvlaError(
            f"the dataset has no {', '.join(missing) or 'images'}; its keys are "
            f"{', '.join(features)}; say with a key map which to use"
        )
    if videos := [key for key in images.values() if visual.get(key) == "video"]:
        raise QvlaError(
            f"{', '.join(videos)}: video features need a video decoder, which this reader has "
            "not; convert them to image features"
        )
    if others := [key for key in images.values() if key not in visual]:
        raise QvlaError(f"{', '.join(others)}: not an image but {features[others[0]]['dtype']}")
    return KeyMap(MappingProxyType(images), keys.state, keys.action)


def _read_tasks(root: Path) -> dict[int, str]:
    table = read_parquet(root / TASKS_PATH)
    # pandas names its index column only if the index had a name.
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not names or "task_index" not in table.column_names:
        raise ArtifactError(
            f"{root / TASKS_PATH} needs the columns task and task_index, has {table.column_names}"
        )
    indices, tasks = table["task_index"].to_pylist(), table[names[0]].to_pylist()
    return dict(zip(indices, tasks, strict=True))


def _read_episodes(root: Path, info: Mapping[str, Any]) -> tuple[EpisodeSpan, ...]:
    paths = sorted((root / "meta/episodes").glob("chunk-*/file-*.parquet"))
    if not paths:
        raise ArtifactError(f"no episodes found: {root}/meta/episodes/chunk-*/file-*.parquet")
    rows = [row for path in paths for row in read_parquet(path, _EPISODE_COLUMNS).to_pylist()]
    rows.sort(key=lambda row: int(row["episode_index"]))
    template = info.get("data_path") or "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    file_starts: dict[str, int] = {}
    spans: list[EpisodeSpan] = []
    for row in rows:
        places = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        file = template.format(**places)
        start, stop = row["dataset_from_index"], row["dataset_to_index"]
        if start != (spans[-1].stop if spans else 0) or stop <= start:
            raise ArtifactError(f"{root}: episode {row['episode_index']} spans {start}..{stop}")
        spans.append(
            EpisodeSpan(len(spans), start, stop, file, file_starts.setdefault(file, start))
        )
    counted = (info["total_episodes"], info["total_frames"])
    found = (len(spans), spans[-1].stop if spans else 0)
    if found != counted or not spans:
        raise ArtifactError(
            f"{root}: info.json counts {counted} episodes and frames, meta/episodes has {found}"
        )
    return tuple(spans)


def _image_bytes(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ArtifactError(f"an image column holds no image bytes but {type(data).__name__}")
    return data


def _matrix(table: Any, key: str | None) -> NDArray[np.float32]:
    """Return a column of vectors or numbers.  float32 [rows, dim]"""
    if key is None:
        return np.zeros((table.num_rows, 0), dtype=np.float32)
    values = np.asarray(table[key].to_pylist(), dtype=np.float32)
    return values.reshape(table.num_rows, -1)

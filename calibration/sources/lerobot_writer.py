"""Writing LeRobotDataset v3.0: parquet files with PNG images inside, whole or not at all."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calibration.sources.image_codec import decode_png
from calibration.sources.lerobot_stats import Stats, image_stats, merge_stats, vector_stats
from qvla_export.shared.artifacts import new_folder, write_json
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

CODEBASE_VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
TASKS_PATH = "meta/tasks.parquet"
IMAGE_PREFIX = "observation.images."
STATE_KEY = "observation.state"
ACTION_KEY = "action"
_CHUNK_FILES = 1000
_COUNTERS = ("frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class Episode:
    """One recorded episode of n frames."""

    # What the whole episode is about, or what its first frame is.
    instruction: str
    # Camera name -> n PNG files, each of one RGB picture of the same size.
    images: Mapping[str, Sequence[bytes]]
    # Proprioceptive state in physical units.  float32 [n, state dim]
    state: NDArray[np.float32]
    # The action to imitate at each frame.  float32 [n, action dim]
    action: NDArray[np.float32]
    # What to do at each of the n frames; empty where that is `instruction` throughout.
    frame_instructions: Sequence[str] = ()

    def __post_init__(self) -> None:
        lengths = {name: len(pngs) for name, pngs in self.images.items()}
        lengths |= {"state": len(self.state), "action": len(self.action)}
        if self.frame_instructions:
            lengths["instructions"] = len(self.frame_instructions)
        if len(set(lengths.values())) != 1 or not len(self.action):
            raise QvlaError(f"an episode needs as many images as states and actions: {lengths}")

    def __len__(self) -> int:
        return len(self.action)

    def instruction_at(self, frame: int) -> str:
        """Return what to do at a frame."""
        return self.frame_instructions[frame] if self.frame_instructions else self.instruction

    def observation(self, frame: int) -> Observation:
        """Return what the policy would see at a frame."""
        images = {name: decode_png(pngs[frame]) for name, pngs in self.images.items()}
        return Observation(images, self.instruction_at(frame), self.state[frame])


@contextlib.contextmanager
def write_dataset(
    root: Path, fps: int, robot_type: str, file_megabytes: int = 100
) -> Iterator["LeRobotWriter"]:
    """Yield a writer; the dataset appears at `root` when the block ends without an error."""
    with new_folder(root) as folder:
        writer = LeRobotWriter(folder, fps, robot_type, file_megabytes)
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
        writer.finish()


class LeRobotWriter:
    """Appends episodes to a new dataset folder; one parquet row group per episode."""

    def __init__(self, root: Path, fps: int, robot_type: str, file_megabytes: int) -> None:
        self.root = root
        self._fps = fps
        self._robot_type = robot_type
        self._file_megabytes = file_megabytes
        self._features: dict[str, Any] = {}
        # Instruction -> task index.
        self._tasks: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        # Column -> each episode's image statistics, or its values themselves.
        self._images: dict[str, list[Stats]] = {}
        self._vectors: dict[str, list[NDArray[Any]]] = {}
        self._frames = 0
        self._file = 0
        self._file_bytes = 0
        self._parquet: Any = None

    def add(self, episode: Episode) -> None:
        """Append one episode.

        Raises:
            QvlaError: its cameras or shapes differ from those of the first one.
        """
        features = _describe(episode, self._fps)
        self._features = self._features or features
        if features != self._features:
            raise QvlaError(
                f"all episodes of a dataset share cameras and shapes: {_shapes(self._features)}, "
                f"episode {len(self._rows)} has {_shapes(features)}"
            )
        table = self._table(episode)
        if self._parquet is not None and self._file_bytes >= self._file_megabytes << 20:
            self._parquet.close()
            self._parquet, self._file, self._file_bytes = None, self._file + 1, 0
        if self._parquet is None:
            path = self.root / DATA_PATH.format(**self._position())
            path.parent.mkdir(parents=True, exist_ok=True)
            self._parquet = pq.ParquetWriter(
                path, table.schema, compression="snappy", write_page_checksum=True
            )
        self._parquet.write_table(table)
        self._file_bytes += table.nbytes
        self._rows.append(self._row(episode, table))
        self._frames += len(episode)

    def abandon(self) -> None:
        """Close the open file of a dataset that will not be finished."""
        if self._parquet is not None:
            self._parquet.close()

    def finish(self) -> None:
        """Write the metadata: info, statistics, tasks and episodes.

        Raises:
            QvlaError: no episode was added.
        """
        if not self._rows:
            raise QvlaError("a dataset needs at least one episode, got none")
        self._parquet.close()
        (self.root / "meta").mkdir(exist_ok=True)
        pq.write_table(_task_table(list(self._tasks)), self.root / TASKS_PATH)
        path = self.root / EPISODES_PATH.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(self._rows), path)
        write_json(self.root / "meta/stats.json", self._stats())
        write_json(self.root / "meta/info.json", self._info())

    def _position(self) -> dict[str, int]:
        chunk, file = divmod(self._file, _CHUNK_FILES)
        return {"chunk_index": chunk, "file_index": file}

    def _table(self, episode: Episode) -> Any:
        n = len(episode)
        phrases = [episode.instruction_at(frame) for frame in range(n)]
        tasks = [self._tasks.setdefault(phrase, len(self._tasks)) for phrase in phrases]
        columns: dict[str, Any] = {}
        for name, pngs in episode.images.items():
            pictures = [{"bytes": png, "path": f"frame-{i:06d}.png"} for i, png in enumerate(pngs)]
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            columns[IMAGE_PREFIX + name] = pa.array(pictures, kind)
        columns[STATE_KEY] = _vectors(episode.state)
        columns[ACTION_KEY] = _vectors(episode.action)
        columns["timestamp"] = pa.array(np.arange(n, dtype=np.float32) / np.float32(self._fps))
        columns["frame_index"] = pa.array(np.arange(n))
        columns["episode_index"] = pa.array(np.full(n, len(self._rows)))
        columns["index"] = pa.array(np.arange(self._frames, self._frames + n))
        columns["task_index"] = pa.array(tasks, pa.int64())
        table = pa.table(columns)
        return table.replace_schema_metadata(_huggingface_metadata(self._features))

    def _row(self, episode: Episode, table: Any) -> dict[str, Any]:
        row: dict[str, Any] = {
            "episode_index": len(self._rows),
            "tasks": list(dict.fromkeys(map(episode.instruction_at, range(len(episode))))),
            "length": len(episode),
            **{f"data/{key}": value for key, value in self._position().items()},
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + len(episode),
        }
        for key in self._features:
            if key.startswith(IMAGE_PREFIX):
                stats = image_stats(episode.images[key.removeprefix(IMAGE_PREFIX)])
                self._images.setdefault(key, []).append(stats)
            else:
                values = _column_to_numpy(table[key])
                self._vectors.setdefault(key, []).append(values)
                stats = vector_stats(values)
            row |= {f"stats/{key}/{name}": value.tolist() for name, value in stats.items()}
        return row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}

    def _stats(self) -> dict[str, dict[str, Any]]:
        merged = {key: merge_stats(parts) for key, parts in self._images.items()}
        merged |= {key: vector_stats(np.concatenate(v)) for key, v in self._vectors.items()}
        return {
            key: {name: value.tolist() for name, value in merged[key].items()}
            for key in self._features
        }

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self._robot_type,
            "total_episodes": len(self._rows),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": _CHUNK_FILES,
            "data_files_size_in_mb": self._file_megabytes,
            "video_files_size_in_mb": 200,
            "fps": self._fps,
            "splits": {"train": f"0:{len(self._rows)}"},
            "data_path": DATA_PATH,
            "video_path": None,
            "features": self._features,
        }


def _describe(episode: Episode, fps: int) -> dict[str, Any]:
    features: dict[str, Any] = {}
    for name, pngs in episode.images.items():
        shape = list(decode_png(pngs[0]).shape)
        names = ["height", "width", "channels"]
        features[IMAGE_PREFIX + name] = {"dtype": "image", "shape": shape, "names": names}
    for key, values in ((STATE_KEY, episode.state), (ACTION_KEY, episode.action)):
        names = [f"{key.rsplit('.')[-1]}_{i}" for i in range(values.shape[1])]
        features[key] = {"dtype": "float32", "shape": [values.shape[1]], "names": names}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for key in _COUNTERS:
        features[key] = {"dtype": "int64", "shape": [1], "names": None}
    return features


def _shapes(features: Mapping[str, Any]) -> dict[str, list[int]]:
    return {key: feature["shape"] for key, feature in features.items() if key not in _COUNTERS}


def _vectors(values: NDArray[np.float32]) -> Any:
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _column_to_numpy(column: Any) -> NDArray[Any]:
    """Return a column of numbers or vectors as rows [n, dim]."""
    combined = column.combine_chunks()
    values = combined.flatten() if pa.types.is_fixed_size_list(combined.type) else combined
    rows: NDArray[Any] = values.to_numpy().reshape(len(combined), -1)
    return rows


def _huggingface_metadata(features: Mapping[str, Any]) -> dict[str, str]:
    # The `datasets` library decodes columns by this note in the parquet schema.
    kinds: dict[str, Any] = {}
    for key, feature in features.items():
        value = {"dtype": feature["dtype"], "_type": "Value"}
        if feature["dtype"] == "image":
            kinds[key] = {"_type": "Image"}
        elif feature["shape"] == [1]:
            kinds[key] = value
        else:
            length = feature["shape"][0]
            kinds[key] = {"feature": value, "length": length, "_type": "Sequence"}
    return {"huggingface": json.dumps({"info": {"features": kinds}})}


def _task_table(tasks: Sequence[str]) -> Any:
    # pandas finds its index, the task strings, by this note in the parquet schema.
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64"},
        {"name": "task", "field_name": "task", "pandas_type": "unicode"},
    ]
    numpy_types = ("int64", "object")
    note = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {**column, "numpy_type": kind, "metadata": None}
            for column, kind in zip(columns, numpy_types, strict=True)
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": list(tasks)})
    return table.replace_schema_metadata({"pandas": json.dumps(note)})

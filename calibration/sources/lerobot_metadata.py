"""What the `meta` folder of a LeRobotDataset says: v3.0 in parquet, v2.0 and v2.1 in JSON lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from calibration.sources.lerobot_paths import V2_DATA, PathTemplate
from calibration.sources.lerobot_videos import VideoPlaces, VideoSpan
from calibration.sources.lerobot_writer import TASKS_PATH
from calibration.sources.other_formats import describe_other, known_format
from calibration.sources.parquet_rows import column_names, read_parquet
from qvla_export.shared.artifacts import require_fields
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import FOREIGN, read_json, read_lines, whole_number

_INFO_FIELDS = ("codebase_version", "fps", "features", "total_episodes", "total_frames")
_VERSIONS = ("v2.0", "v2.1", "v3.0")
_EPISODES_JSON = "meta/episodes.jsonl"
_TASKS_JSON = "meta/tasks.jsonl"
_CHUNK_EPISODES = 1000
_EPISODE_COLUMNS = ("episode_index", "dataset_from_index", "dataset_to_index")
# Says nothing that rows do not say better, so it may be missing; where it stands, it shows metadata
# that a merge has damaged.
_FILE_COLUMNS = ("data/chunk_index", "data/file_index")


@dataclass(frozen=True)
class EpisodeSpan:
    """Where an episode's frames are."""

    # Episode number, as its rows have it.
    index: int
    # Global frame indices [start, stop).
    start: int
    stop: int
    # v2: the episode's own parquet file relative to the dataset's root; v3.0: None.
    file: str | None = None
    # Column of videos -> where its pictures are.
    videos: Mapping[str, VideoSpan] = field(default_factory=lambda: MappingProxyType({}))

    def __len__(self) -> int:
        return self.stop - self.start

    def place(self, root: Path, frame: int, column: str) -> str:
        """Return a text that says where a value of a dataset is."""
        return f"{root}, episode {self.index}, frame {frame}, column {column}"


def read_info(root: Path) -> dict[str, Any]:
    """Return `meta/info.json`.

    Raises:
        ArtifactError: it is missing, damaged or of another version, or `root` of another format.
    """
    path = root / "meta/info.json"
    if not path.exists():
        if name := known_format(root):
            raise ArtifactError(
                f"{root} is {name}, where a LeRobotDataset is needed; qvla calibrate and qvla "
                "deploy read it"
            )
        if other := describe_other(root):
            raise ArtifactError(other)
    info = read_json(path, "LeRobot dataset info", FOREIGN)
    if not isinstance(info, dict):
        raise ArtifactError(f"{path} holds no JSON object")
    require_fields(info, _INFO_FIELDS, str(path))
    version = "v" + str(info["codebase_version"]).removeprefix("v")
    if version not in _VERSIONS:
        remedy = (
            "convert it with the scripts of the LeRobot release that wrote it, up to v2.1"
            if version < _VERSIONS[0]
            else "write it with a LeRobot release of v3.0 datasets, or update QVLA"
        )
        raise ArtifactError(
            f"{root} is a LeRobotDataset {info['codebase_version']}, this reads "
            f"{', '.join(_VERSIONS)}; {remedy}"
        )
    if not isinstance(info["features"], dict):
        raise ArtifactError(f"{path}: features must be an object of columns, got no such thing")
    fps = info["fps"]
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise ArtifactError(f"{path}: fps must be a positive number, got {fps!r}")
    return info


def read_tasks(root: Path) -> dict[int, str]:
    """Return task index -> instruction; what is null is an empty text.

    Raises:
        ArtifactError: the file is missing, damaged or lacks a column, a task is no text, or two
            have one number.
    """
    path = root / TASKS_PATH
    if not path.exists() and (root / _TASKS_JSON).exists():
        path = root / _TASKS_JSON
        rows = [row for _, row in read_lines(path, "LeRobot tasks", FOREIGN)]
    elif not path.exists():
        raise ArtifactError(
            f"a file of the dataset is missing: {path}; copy it as well, or say what to do with "
            "--instruction TEXT or --instruction-column COLUMN"
        )
    else:
        table = read_parquet(path)
        # pandas names its index column only if the index had a name.
        names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
        if not names or "task_index" not in table.column_names:
            raise ArtifactError(
                f"{path} needs the columns task and task_index, has {table.column_names}"
            )
        columns = (table["task_index"].to_pylist(), table[names[0]].to_pylist())
        rows = [{"task_index": i, "task": t} for i, t in zip(*columns, strict=True)]
    tasks: dict[int, str] = {}
    for number, row in enumerate(rows):
        place = f"{path}, row {number}, column"
        index = whole_number(row.get("task_index"), f"{place} task_index")
        text = row.get("task")
        if text is not None and not isinstance(text, str):
            raise ArtifactError(f"{place} task: an instruction is a text, got {text!r:.60}")
        if tasks.setdefault(index, text or "") != (text or ""):
            raise ArtifactError(
                f"{place} task_index: {index} is {tasks[index]!r:.60} in a row before and "
                f"{text!r:.60} here; give each task a number of its own"
            )
    return tasks


def read_episodes(
    root: Path, info: Mapping[str, Any], videos: Sequence[str] = ()
) -> tuple[EpisodeSpan, ...]:
    """Return where the frames of each episode are, in order, with the files of columns of videos.

    Raises:
        ArtifactError: the files are missing or damaged, or do not fit `info`.
    """
    places = VideoPlaces(root, info, videos)
    if (root / _EPISODES_JSON).exists() and not (root / "meta/episodes").exists():
        spans = _spans_of_lines(root, info, places)
    else:
        spans = _spans_of_tables(root, places)
    counts = (info["total_episodes"], info["total_frames"])
    present = (len(spans), spans[-1].stop if spans else 0)
    if present != counts or not spans:
        raise ArtifactError(
            f"{root}: info.json counts {counts} episodes and frames, meta/episodes has {present}; "
            "the dataset is incomplete or its metadata belongs to another one"
        )
    return tuple(spans)


def _spans_of_tables(root: Path, places: VideoPlaces) -> list[EpisodeSpan]:
    paths = sorted((root / "meta/episodes").glob("chunk-*/file-*.parquet"))
    if not paths:
        raise ArtifactError(f"no episodes found: {root}/meta/episodes/chunk-*/file-*.parquet")
    spans: list[EpisodeSpan] = []
    for path in paths:
        present = column_names(path)
        places.require_columns(path, present)
        columns = _EPISODE_COLUMNS + tuple(c for c in _FILE_COLUMNS if c in present)
        table = read_parquet(path, columns + places.table_columns)
        for number, row in enumerate(table.to_pylist()):
            place = f"{path}, episode {number}"
            numbers = {c: whole_number(row[c], f"{place}, column {c}") for c in columns}
            index, start, stop = (numbers[name] for name in _EPISODE_COLUMNS)
            spans.append(EpisodeSpan(index, start, stop, videos=places.of_row(row, place)))
    spans.sort(key=lambda span: (span.index, span.start))
    end = 0
    for span in spans:
        if span.start != end or span.stop <= span.start:
            raise ArtifactError(
                f"{root}: episode {span.index} spans {span.start}..{span.stop}, the next frame is "
                f"{end}; write meta/episodes anew: episodes follow each other and are not empty"
            )
        end = span.stop
    return spans


def _spans_of_lines(root: Path, info: Mapping[str, Any], places: VideoPlaces) -> list[EpisodeSpan]:
    path = root / _EPISODES_JSON
    # What was converted back from v3.0 may still write its path, which cannot name an episode.
    stated = {} if "file_index" in str(info.get("data_path")) else info
    template = PathTemplate.of(root / "meta/info.json", stated, "data_path", V2_DATA)
    chunk = whole_number(info.get("chunks_size", _CHUNK_EPISODES), f"{root}, chunks_size")
    rows = []
    lines = (row for _, row in read_lines(path, "LeRobot episodes", FOREIGN))
    for number, line in enumerate(lines):
        place = f"{path}, row {number}, column"
        index = whole_number(line.get("episode_index"), f"{place} episode_index")
        rows.append((index, whole_number(line.get("length"), f"{place} length")))
    spans: list[EpisodeSpan] = []
    for index, length in sorted(rows):
        start = spans[-1].stop if spans else 0
        if not length:
            raise ArtifactError(f"{root}: episode {index} has no frames")
        folder = index // max(chunk, 1)
        file = template.file(episode_chunk=folder, episode_index=index)
        videos = places.of_episode(index, folder)
        spans.append(EpisodeSpan(index, start, start + length, file, videos))
    return spans

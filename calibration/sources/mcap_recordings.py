"""Our own recordings as demonstrations: what `qvla serve --record` and `qvla run --record` wrote.

A recording has no episodes of its own. One ends where the instruction changes, where nothing was
seen for some seconds, and with its file: a long recording has several (`recording_files`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mcap.records import Channel, McapRecord, Message, Metadata
from numpy.typing import NDArray

from calibration.sources.data_paths import visible
from calibration.sources.frame_source import FrameSource, Moment
from calibration.sources.lerobot_columns import KeyMap
from calibration.sources.source_columns import Offer, choose_columns
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import Node
from qvla_export.shared.mcap_records import read_records, recording_files
from qvla_export.shared.recorded_messages import (
    ABOUT,
    ACTION,
    CAMERA,
    FORMAT,
    OBSERVATION,
    action_of,
    read_message,
    read_picture,
)

_GAP_S = 5.0
_STATE = "state"
_WRONG = (LookupError, TypeError, ValueError, AttributeError)


@dataclass
class _Sight:
    """One observation: where its pictures are, and what was done."""

    path: Path
    time_ns: int
    instruction: str
    state: Node
    # Camera -> offset of the record, or of its chunk.
    places: dict[str, int]
    action: NDArray[np.float32]
    # Of the file's channels, which only its first chunks may say.
    topics: Mapping[int, str]


class McapRecordings(FrameSource):
    """The observations of a file and those that continue it, or of a folder's; a `DataSource`.

    Raises:
        ArtifactError: a file is no recording of ours, or holds no observation.
    """

    format_name = "MCAP recording"

    def __init__(self, root: Path, keys: KeyMap | None = None) -> None:
        self.root = root
        self._paths = (
            list(recording_files(root)) if root.is_file() else visible(root.glob("*.mcap"))
        )
        self._episodes = [e for path in self._paths for e in _cut(_read_index(path))]
        if not self._episodes:
            raise ArtifactError(f"{root} holds no observations with their pictures; record some")
        self.episode_lengths = tuple(map(len, self._episodes))
        self.fps = _rate(self._episodes)
        cameras = list(self._episodes[0][0].places)
        offer = Offer(cameras, [_STATE, "action"], (_STATE,), ("action",))
        self.columns = choose_columns(keys or KeyMap(), offer, str(root))
        # The pictures of one moment, by camera.
        self._pictures: tuple[tuple[Path, int], dict[str, Any]] | None = None

    def picture(self, moment: Moment, column: str) -> Any:
        """Return pixels uint8 [h, w, 3]."""
        sight = self._sight(moment)
        key = (sight.path, sight.time_ns)
        if self._pictures is None or self._pictures[0] != key:
            self._pictures = (key, _read_pictures(sight))
        if column not in self._pictures[1]:
            raise ArtifactError(f"{moment.column(column)}: no such picture was recorded")
        return self._pictures[1][column]

    def vector(self, moment: Moment, column: str) -> Any:
        """Return the state, or the first action of a chunk."""
        sight = self._sight(moment)
        return sight.state.numbers(non_finite=True) if column == _STATE else sight.action

    def instruction(self, moment: Moment) -> str:
        """Return what was said with the observation."""
        return self._sight(moment).instruction

    def files(self) -> Iterable[Path]:
        """Return the recordings."""
        return self._paths

    def _sight(self, moment: Moment) -> _Sight:
        return self._episodes[moment.episode][moment.frame]


def _read_index(path: Path) -> list[_Sight]:
    """Return the observations of a file in the order in which they were seen."""
    topics: dict[int, str] = {}
    places: dict[int, dict[str, int]] = {}
    sights: dict[int, _Sight] = {}
    is_ours = False
    for offset, record in read_records(path):
        if isinstance(record, Metadata) and record.name == ABOUT:
            is_ours = is_ours or record.metadata.get("format") == FORMAT
        elif isinstance(record, Channel):
            topics[record.id] = record.topic
        elif isinstance(record, Message) and is_ours:
            topic = topics.get(record.channel_id, "")
            try:
                if topic.startswith(CAMERA):
                    camera = topic.removeprefix(CAMERA)
                    places.setdefault(record.log_time, {})[camera] = offset
                elif topic == OBSERVATION:
                    pictures = places.pop(record.log_time, {})
                    one = _observation(path, record, pictures)
                    one.topics = topics
                    sights[record.log_time] = one
                elif topic == ACTION:
                    _add_action(read_message(record.data), sights)
            except _WRONG as error:
                raise ArtifactError(
                    f"{path}: a message on {topic!r} contradicts its schema: {error!r:.200}"
                ) from None
    if not is_ours:
        raise ArtifactError(
            f"{path} is not a recording of format {FORMAT!r}; other MCAP files are not read"
        )
    return [sights[time_ns] for time_ns in sorted(sights)]


def _observation(path: Path, record: Message, pictures: Mapping[str, int]) -> _Sight:
    message = Node(read_message(record.data), f"{path}, {OBSERVATION}")
    cameras = [camera.text() for camera in message.field("cameras").elements()]
    return _Sight(
        path,
        record.log_time,
        message.field("instruction").text(),
        message.field(_STATE),
        {camera: pictures[camera] for camera in cameras},
        np.zeros(0, np.float32),
        {},
    )


def _add_action(message: Mapping[str, Any], sights: Mapping[int, _Sight]) -> None:
    about = sights.get(message["observation_ns"])
    if about is not None and not message["error"]:
        about.action = action_of(message).actions[0]


def _cut(sights: list[_Sight]) -> list[list[_Sight]]:
    episodes: list[list[_Sight]] = []
    for one in sights:
        before = episodes[-1][-1] if episodes else None
        if (
            before is None
            or before.instruction != one.instruction
            or list(before.places) != list(one.places)
            or one.time_ns - before.time_ns > _GAP_S * 1e9
        ):
            episodes.append([])
        episodes[-1].append(one)
    return episodes


def _rate(episodes: list[list[_Sight]]) -> float:
    """Return observations a second, of the usual distance in time."""
    times = [np.diff([one.time_ns for one in episode]) for episode in episodes]
    steps = np.concatenate([np.zeros(0), *times])
    return float(np.clip(1e9 / max(np.median(steps), 1.0), 0.1, 1e4)) if len(steps) else 1.0


def _read_pictures(sight: _Sight) -> dict[str, Any]:
    pictures: dict[str, Any] = {}
    for offset in sorted(set(sight.places.values())):
        for record in _at(sight.path, offset):
            if isinstance(record, Message) and record.log_time == sight.time_ns:
                topic = sight.topics.get(record.channel_id, "")
                if topic.startswith(CAMERA):
                    try:
                        pictures[topic.removeprefix(CAMERA)] = read_picture(record.data)
                    except _WRONG as error:
                        raise ArtifactError(
                            f"{sight.path}: a message on {topic!r} contradicts its schema: {error}"
                        ) from None
    return pictures


def _at(path: Path, offset: int) -> Iterable[McapRecord]:
    """Yield the records of one place."""
    for where, record in read_records(path, offset):
        if where != offset:
            return
        yield record

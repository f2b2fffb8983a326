"""Read a recording, also one whose recorder was killed or whose file is damaged.

Everything up to the first damage is read; nothing in a file is believed before it was checked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mcap.records import Channel, Header, McapRecord, Message, Metadata
from numpy.typing import NDArray

from jetson.errors import WireError
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import parse_document
from qvla_export.shared.mcap_records import read_about, read_records, recording_files
from qvla_export.shared.observation import Observation
from qvla_export.shared.recorded_messages import (
    ACTION,
    CAMERA,
    COMPLETE,
    END,
    FORMAT,
    OBSERVATION,
    action_of,
    observation_of,
    read_message,
    read_picture,
)

# Observations that wait for their action; a loop asks about one after the other.
_MAX_WAITING = 16


@dataclass(frozen=True)
class Moment:
    """One observation and what the policy made of it when it was recorded."""

    # Nanoseconds since 1970.
    time_ns: int
    observation: Observation
    # None where there was no action. Its `normalized` is empty where only `actions` were known.
    chunk: ActionChunk | None
    # Why not; empty where there was one.
    error: str


class Recording:
    """A file, and those that continue it: what it says of itself, and the moments of all.

    Raises:
        ArtifactError: it is not there, or is no recording of this format.
    """

    def __init__(self, path: Path) -> None:
        """Read what the file says of itself."""
        self.path = path
        about = read_about(path)
        if about is None:
            raise ArtifactError(
                f"{path} is not a recording of format {FORMAT!r}; make one with "
                "qvla serve --record FILE.mcap or qvla run --record FILE.mcap"
            )
        # As `McapRecorder` wrote it: source, images, bundle_digest, versions, ...
        self.about = about
        try:
            self.contract = PolicyContract.from_json(
                parse_document(self.about["contract"], "the contract is not valid JSON")
            )
        except (KeyError, ValueError, WireError) as error:
            raise ArtifactError(f"{path} does not say which policy acted: {error}") from None
        # Events written and dropped; None where the recorder was killed. Known after `moments`.
        self.counts: dict[str, int] | None = None
        # "complete", why the recorder stopped, or which file continues this one and is not here;
        # None where it was killed. Known likewise.
        self.ended: str | None = None

    @property
    def lossless(self) -> bool:
        """Whether the pictures are exactly those the policy saw."""
        return self.about.get("images") == "png"

    def moments(self) -> Iterator[Moment]:
        """Return the observations with their actions, in the order in which they were answered.

        Raises:
            ArtifactError: a message contradicts its schema.
        """
        topics: dict[int, str] = {}
        pictures: dict[int, dict[str, NDArray[np.uint8]]] = {}
        waiting: dict[int, Observation] = {}
        for record in self._records():
            if isinstance(record, Header):
                # Of a file; its channels have numbers of their own.
                topics, self.ended, self.counts = {}, None, None
            elif isinstance(record, Channel):
                topics[record.id] = record.topic
            elif isinstance(record, Metadata) and record.name == END:
                counts = record.metadata.items()
                self.ended = record.metadata.get("ended", COMPLETE)
                self.counts = {k: int(v) for k, v in counts if v.isdecimal() and len(v) < 20}
            elif isinstance(record, Message):
                topic, time_ns = topics.get(record.channel_id, ""), record.log_time
                try:
                    if topic.startswith(CAMERA):
                        picture = read_picture(record.data)
                        together = _drop_oldest(pictures).setdefault(time_ns, {})
                        together[topic.removeprefix(CAMERA)] = picture
                    elif topic == OBSERVATION:
                        seen = observation_of(read_message(record.data), pictures.pop(time_ns, {}))
                        _drop_oldest(waiting)[time_ns] = seen
                    elif topic == ACTION:
                        moment = _moment(record.data, time_ns, waiting)
                        if moment is not None:
                            yield moment
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise ArtifactError(
                        f"{self.path}: a message on {topic!r} contradicts its schema: {error}"
                    ) from None

    def observations(self, limit: int = 256) -> list[Observation]:
        """Return the first observations that got an action, as a profile sends them.

        Raises:
            ArtifactError: there is none, or a message contradicts its schema.
        """
        found = []
        for moment in self.moments():
            if moment.chunk is not None:
                found.append(moment.observation)
            if len(found) == limit:
                break
        if not found:
            raise ArtifactError(f"{self.path} holds no observation that got an action")
        return found

    def _records(self) -> Iterator[McapRecord]:
        """Yield the records of all files, of each up to its end or to where it is damaged."""
        for path in recording_files(self.path):
            for _, record in read_records(path):
                yield record


def _drop_oldest(waiting: dict[int, Any]) -> dict[int, Any]:
    while len(waiting) >= _MAX_WAITING:
        del waiting[next(iter(waiting))]
    return waiting


def _moment(data: bytes, time_ns: int, waiting: dict[int, Observation]) -> Moment | None:
    """Return what an action message completes; None where its observation is not known."""
    message = read_message(data)
    seen = waiting.pop(message["observation_ns"], None)
    if seen is None:
        return None
    error = str(message["error"])
    if error:
        return Moment(time_ns, seen, None, error)
    return Moment(time_ns, seen, action_of(message), "")

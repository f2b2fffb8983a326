"""The noun `PushState`: which robots answered what, so that a push that was ended goes on."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.json_documents import Node, read_json

FORMAT = "qvla-push-1"
# "left out": its wave, or one before it, was stopped first.
Answer = Literal["healthy", "failed", "unreachable", "left out"]
_ANSWERS: tuple[Answer, ...] = get_args(Answer)


@dataclass(frozen=True)
class RobotOutcome:
    """What came of a robot."""

    name: str
    # Of the release.
    digest: str
    answer: Answer
    # In words; empty for a healthy one.
    reason: str = ""
    # To it in this push, resumed connections included; how often it was connected to.
    sent_bytes: int = 0
    connections: int = 0
    # Whether an earlier push did it.
    before: bool = False


@dataclass
class PushState:
    """Outcomes by robot, written whole after each."""

    path: Path
    outcomes: dict[str, RobotOutcome] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def beside(robots: Path) -> "PushState":
        """Read what earlier pushes of a file of robots came to; nothing where there was none.

        Raises:
            ArtifactError: the file is not one of this version.
        """
        path = robots.with_suffix(".push.json")
        state = PushState(path)
        if path.is_file():
            top = Node(
                read_json(path, "state of the push"),
                path.name,
                remedy="remove it: robots that are up to date say so again",
            )
            if not top.has("format") or top.field("format").value != FORMAT:
                raise top.wrong(f"format {FORMAT} is needed")
            for name, node in top.field("robots").fields().items():
                state.outcomes[name] = _outcome(name, node)
        return state

    def done(self, name: str, digest: str) -> RobotOutcome | None:
        """Return the outcome of a robot that answered healthy with this release."""
        outcome = self.outcomes.get(name)
        if outcome is None or (outcome.answer, outcome.digest) != ("healthy", digest):
            return None
        return outcome

    def add(self, outcome: RobotOutcome) -> None:
        """Write an outcome down; callable from several threads."""
        with self._lock:
            self.outcomes[outcome.name] = outcome
            document = {"format": FORMAT, "robots": self._robots()}
            write_json(self.path, document)

    def _robots(self) -> Mapping[str, Any]:
        robots = {name: asdict(one) for name, one in self.outcomes.items()}
        return {
            name: {key: value for key, value in one.items() if key not in ("name", "before")}
            for name, one in robots.items()
        }

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the fleet: one push at a time.

        Raises:
            QvlaError: another one runs.
        """
        path = self.path.with_suffix(".lock")
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise QvlaError(f"another push holds {path}; wait until it has ended") from None
            yield
        finally:
            os.close(handle)


def _outcome(name: str, node: Node) -> RobotOutcome:
    answer = node.field("answer").value
    if answer not in _ANSWERS:
        raise ArtifactError(f"{node.place}: an answer must be one of {_ANSWERS}")
    return RobotOutcome(
        name,
        node.field("digest").text(64),
        answer,
        node.field("reason").text(),
        node.field("sent_bytes").whole(),
        node.field("connections").whole(),
    )

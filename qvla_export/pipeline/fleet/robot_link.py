"""One robot at the other end of ssh: a single command there, which asks for what it lacks.

ssh is the system's: its configuration, agents, certificates and jump hosts hold. Host keys are
always checked. The robot runs `qvla robot update --from -` (`jetson.install.release_source`).
"""

import re
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from jetson.install.release_source import MOST_LINE_BYTES, STREAM, StreamReply
from qvla_export.pipeline.fleet.robots_file import Fleet, FleetRobot
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.json_documents import object_or_empty

_CONNECTION_LOST = 255
_CHUNK_BYTES = 1 << 18
_MOST_ANSWER_BYTES, _MOST_REQUESTS = 1 << 20, 100_000
# What a robot may ask for: no path leads out of the repository.
_FILE = re.compile(r"(metadata|targets)(/[A-Za-z0-9][A-Za-z0-9._-]{0,255}){1,3}")
_OPTIONS = (
    *("BatchMode=yes", "StrictHostKeyChecking=yes", "UpdateHostKeys=no"),
    *("ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3"),
    *("ClearAllForwardings=yes", "ForwardAgent=no", "ControlMaster=no", "ControlPath=none"),
)
# Another attempt would end in the same way.
_HOPELESS = {
    "Host key verification failed": "its host key is not known, or has changed: look at the "
    "machine, then put its key into known_hosts",
    "Permission denied": "it takes no key that is offered: set `user` and `key`",
}


class Unreachable(QvlaError):
    """A robot cannot be reached, or the connection ended before it answered."""

    def __init__(self, message: str, hopeless: bool) -> None:
        """State why, and whether another attempt would end in the same way."""
        super().__init__(message)
        self.hopeless = hopeless


@dataclass
class Traffic:
    """What went to a robot; others may look while it grows."""

    sent_bytes: int = 0
    # Of each file, in the order of requests.
    files: list[tuple[str, int, int]] = field(default_factory=list)
    # What the robot says that it does: install, check, probation.
    stage: str = "connect"
    on_change: Callable[["Traffic"], None] = lambda traffic: None


def update_command(robot: FleetRobot, digest: str, groups: tuple[str, ...]) -> list[str]:
    """Return the words that run on the robot."""
    settings = robot.settings
    words = [*settings.command, "robot", "update", digest, "--from", STREAM]
    if settings.healthy == "proven":
        words += ["--proven-within", str(settings.proven_within_s)]
    words += [word for group in groups for word in ("--group", group)]
    for option in ("target", "root", "store"):
        if (value := getattr(settings, option)) is not None:
            words += [f"--{option}", value]
    if settings.restart_unit is not None:
        words += ["--restart-unit", settings.restart_unit]
    return words


def ssh_command(fleet: Fleet, robot: FleetRobot, words: list[str]) -> list[str]:
    """Return the words of ssh that run a command on a robot."""
    settings = robot.settings
    ssh = ["ssh", "-T", *(word for option in _OPTIONS for word in ("-o", option))]
    if fleet.ssh_config is not None:
        ssh += ["-F", str(fleet.ssh_config)]
    if fleet.known_hosts is not None:
        ssh += ["-o", f'UserKnownHostsFile="{fleet.known_hosts}"']
        ssh += ["-o", "GlobalKnownHostsFile=/dev/null"]
    if settings.key is not None:
        ssh += ["-i", str(settings.key), "-o", "IdentitiesOnly=yes"]
    for option, value in (("-p", settings.port), ("-l", settings.user)):
        if value is not None:
            ssh += [option, str(value)]
    # The shell there takes them apart again.
    return [*ssh, "--", robot.host, shlex.join(words)]


def converse(fleet: Fleet, robot: FleetRobot, words: list[str], traffic: Traffic) -> dict[str, Any]:
    """Run a command on a robot, hand out what it asks for, and return what it answers.

    Raises:
        Unreachable: there was no connection, or it ended before the answer.
        QvlaError: the answer is none.
    """
    start_s = time.monotonic()
    with tempfile.TemporaryFile() as errors, _ssh(fleet, robot, words, errors) as process:
        answer = b""
        with suppress(BrokenPipeError, ConnectionResetError):
            answer = _answer(fleet.repository, process, traffic)
        with suppress(OSError):
            _stdin(process).close()
        status = process.wait()
        errors.seek(0)
        said = " ".join(errors.read(1 << 16).decode(errors="replace").split())[-600:]
    document = object_or_empty(answer)
    if type(document.get("ok")) is bool:
        return document
    if status == _CONNECTION_LOST or status < 0:
        late = time.monotonic() - start_s >= robot.settings.within_s
        raise _unreachable(said, robot.settings.within_s if late else None)
    raise QvlaError(f"{shlex.join(words[:4])} ended with status {status} and no answer: {said}")


@contextmanager
def _ssh(
    fleet: Fleet, robot: FleetRobot, words: list[str], errors: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    command = ssh_command(fleet, robot, words)
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors)
    except FileNotFoundError:
        raise QvlaError("ssh is not installed here; install OpenSSH's client") from None
    limit = threading.Timer(robot.settings.within_s, process.kill)
    limit.daemon = True
    limit.start()
    try:
        yield process
    finally:
        limit.cancel()
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                assert stream is not None
                stream.close()


def _answer(repository: Path, process: subprocess.Popen[bytes], traffic: Traffic) -> bytes:
    """Hand out files until the command there ends; return what else it printed."""
    assert process.stdout is not None
    answer, requests = b"", 0
    while line := process.stdout.readline(MOST_LINE_BYTES):
        message = _message(line)
        if "get" in message:
            requests += 1
            if requests > _MOST_REQUESTS:
                raise QvlaError("it asks for more files than a release has")
            _send(repository, message, _stdin(process), traffic)
        elif isinstance(message.get("stage"), str):
            traffic.stage = message["stage"][:40]
            traffic.on_change(traffic)
        elif len(answer) < _MOST_ANSWER_BYTES:
            answer += line
    return answer


def _message(line: bytes) -> dict[str, Any]:
    """Return a request of the stream; nothing where a line is part of the answer."""
    return object_or_empty(line) if line.startswith(b'{"') else {}


def _send(repository: Path, message: dict[str, Any], stdin: IO[bytes], traffic: Traffic) -> None:
    name, offset = message["get"], message.get("offset")
    if not isinstance(name, str) or _FILE.fullmatch(name) is None:
        raise QvlaError(f"it asks for {name!r:.80}, which no repository has")
    path = repository / name
    nbytes = path.stat().st_size if path.is_file() else None
    if type(offset) is not int or offset < 0 or nbytes is None:
        stdin.write(StreamReply(None).to_line())
        stdin.flush()
        return
    left = max(0, nbytes - offset)
    stdin.write(StreamReply(left).to_line())
    traffic.files.append((name, offset, left))
    with path.open("rb") as file:
        file.seek(offset)
        while left and (chunk := file.read(min(_CHUNK_BYTES, left))):
            stdin.write(chunk)
            left -= len(chunk)
            traffic.sent_bytes += len(chunk)
            traffic.on_change(traffic)
    stdin.flush()
    if left:
        raise QvlaError(f"{path} became shorter while it was read; publish again")


def _stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def _unreachable(said: str, within_s: float | None) -> Unreachable:
    if within_s is not None:
        return Unreachable(f"it has not ended after {within_s:.0f} s (within_s)", True)
    for mark, remedy in _HOPELESS.items():
        if mark in said:
            return Unreachable(f"{mark}: {remedy}", True)
    return Unreachable(said or "the connection ended before it answered", False)

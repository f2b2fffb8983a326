"""The noun `ReleaseSource`: where a repository's files come from.

A folder, a static HTTP server, or whoever started this process and holds its stdin and stdout, as
`qvla push` does over ssh. All give a file's bytes from any offset on, so that a download that was
cut goes on.
"""

import json
import os
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import httpx

from jetson.errors import RemoteError
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.json_documents import object_or_empty

_CHUNK_BYTES = 1 << 20
_CONNECT_S, _SILENCE_S = 10.0, 30.0
# A peer that trickles is given up after a minute that was slower than this.
_PATIENCE_S, _LEAST_BYTES_PER_S = 60.0, 1000
# What a place is called that is at the other end of stdin and stdout.
STREAM = "-"
# Of a line of the stream.
MOST_LINE_BYTES = 4096


class NoSuchFile(QvlaError):
    """A repository has no file of a name."""


class ReleaseSource(Protocol):
    """Files of a repository."""

    # In words, for messages.
    place: str

    def stream(self, name: str, offset: int = 0) -> Iterator[bytes]:
        """Yield a file's bytes from an offset on.

        Raises:
            NoSuchFile: the repository has none of this name.
            RemoteError: it cannot be read, or not to its end; what came before is good.
        """
        ...


class FolderSource:
    """A repository in a folder: a USB stick, a mounted share."""

    def __init__(self, folder: Path) -> None:
        """Take a folder.

        Raises:
            RemoteError: it is not there.
        """
        if not folder.is_dir():
            raise RemoteError(f"repository not found: {folder}; qvla release publish makes one")
        self.place = str(folder)
        self._folder = folder

    def stream(self, name: str, offset: int = 0) -> Iterator[bytes]:
        """Yield a file's bytes from an offset on; see `ReleaseSource`."""
        path = self._folder / PurePosixPath(name)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NoSuchFile(f"{path} is not there") from None
        except OSError as error:
            raise RemoteError(f"{path} cannot be read: {error.strerror}") from None


class HttpSource:
    """A repository on any HTTP server that hands out files."""

    def __init__(self, url: str, now_s: Callable[[], float] = time.monotonic) -> None:
        """Take the URL of a repository."""
        self.place = url.rstrip("/")
        self._now_s = now_s
        self._http = httpx.Client(
            timeout=httpx.Timeout(_SILENCE_S, connect=_CONNECT_S),
            headers={"accept-encoding": "identity", "user-agent": "qvla"},
            follow_redirects=True,
        )

    def stream(self, name: str, offset: int = 0) -> Iterator[bytes]:
        """Yield a file's bytes from an offset on; see `ReleaseSource`."""
        url = f"{self.place}/{name}"
        headers = {"range": f"bytes={offset}-"} if offset else {}
        try:
            with self._http.stream("GET", url, headers=headers) as response:
                # Servers answer so where the whole file is there already.
                if offset and response.status_code == 416:
                    return
                if response.status_code in (403, 404):
                    raise NoSuchFile(f"{url} answered {response.status_code}")
                if response.status_code not in (200, 206):
                    raise RemoteError(f"{url} answered {response.status_code}")
                # A server that knows no ranges sends all of it again.
                skip = offset if response.status_code == 200 else 0
                yield from self._chunks(url, response, skip)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteError(
                f"{url} could not be fetched: {type(error).__name__}: {error}; what came is kept, "
                "the same command goes on"
            ) from None

    def _chunks(self, url: str, response: httpx.Response, skip: int) -> Iterator[bytes]:
        start_s, nbytes = self._now_s(), 0
        for chunk in response.iter_raw():
            nbytes += len(chunk)
            slow_s = self._now_s() - start_s - _PATIENCE_S
            if slow_s > 0 and nbytes < slow_s * _LEAST_BYTES_PER_S:
                raise RemoteError(
                    f"{url} sends less than {_LEAST_BYTES_PER_S} bytes a second; what came is "
                    "kept, the same command goes on"
                )
            part, skip = chunk[skip:], max(0, skip - len(chunk))
            if part:
                yield part


@dataclass(frozen=True)
class StreamReply:
    """What the other end of a stream says before it sends a file."""

    # That follow; None where it has no such file.
    nbytes: int | None

    def to_line(self) -> bytes:
        """Return the line that announces the bytes."""
        return json.dumps({"nbytes": self.nbytes}).encode() + b"\n"


class StreamedSource:
    """A repository at the other end of two pipes: a line asks for a file, its bytes come.

    Asked for is `{"get": NAME, "offset": N}`; `{"nbytes": N}` and so many bytes answer, or null.
    """

    place = "the other end of stdin"

    def __init__(self, incoming: int, outgoing: int, silence_s: float = _SILENCE_S) -> None:
        """Take the descriptors of the pipes, and how long the other end may be silent."""
        self._incoming, self._outgoing = incoming, outgoing
        self._silence_s = silence_s
        self._rest = b""

    def stream(self, name: str, offset: int = 0) -> Iterator[bytes]:
        """Yield a file's bytes from an offset on; see `ReleaseSource`."""
        say_line({"get": name, "offset": offset}, self._outgoing)
        left = self._reply()
        if left is None:
            raise NoSuchFile(f"{self.place} has no {name}")
        while left:
            # Read to the end of what was announced, and no further.
            chunk = self._rest[:left] or self._read(min(left, _CHUNK_BYTES))
            self._rest = self._rest[len(chunk) :] if self._rest else b""
            left -= len(chunk)
            yield chunk

    def _reply(self) -> int | None:
        while b"\n" not in self._rest:
            if len(self._rest) > MOST_LINE_BYTES:
                raise RemoteError(f"{self.place} speaks another language than qvla push")
            self._rest += self._read(MOST_LINE_BYTES)
        line, _, self._rest = self._rest.partition(b"\n")
        nbytes: int | None = object_or_empty(line).get("nbytes", -1)
        if nbytes is None or (type(nbytes) is int and nbytes >= 0):
            return nbytes
        raise RemoteError(f"{self.place} speaks another language than qvla push: {line!r:.80}")

    def _read(self, most: int) -> bytes:
        # Whoever is cut off without a word must not hold the store for ever.
        ready, _, _ = select.select([self._incoming], [], [], self._silence_s)
        chunk = os.read(self._incoming, most) if ready else b""
        if not chunk:
            how = "hung up" if ready else f"said nothing for {self._silence_s:.0f} s"
            raise RemoteError(f"{self.place} {how}; what came is kept, the same command goes on")
        return chunk


def say_line(message: dict[str, object], outgoing: int = 1) -> None:
    """Send a line to the other end of a stream.

    Raises:
        RemoteError: nobody is there any more.
    """
    data = json.dumps(message).encode() + b"\n"
    try:
        while data:
            data = data[os.write(outgoing, data) :]
    except OSError as error:
        raise RemoteError(f"the other end of stdout is gone: {error.strerror}") from None


def open_source(place: str) -> ReleaseSource:
    """Return the source of a URL, a folder, or "-": the other end of stdin and stdout."""
    if place == STREAM:
        return StreamedSource(0, 1)
    if place.startswith(("http://", "https://")):
        return HttpSource(place)
    return FolderSource(Path(place))

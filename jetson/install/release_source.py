"""The noun `ReleaseSource`: where a repository's files come from, a folder or a static HTTP server.

Both give a file's bytes from any offset on, so that a download that was cut goes on.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

import httpx

from jetson.errors import RemoteError
from qvla_export.shared.errors import QvlaError

_CHUNK_BYTES = 1 << 20
_CONNECT_S, _SILENCE_S = 10.0, 30.0
# A peer that trickles is given up after a minute that was slower than this.
_PATIENCE_S, _LEAST_BYTES_PER_S = 60.0, 1000


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


def open_source(place: str) -> ReleaseSource:
    """Return the source of a URL or a folder."""
    if place.startswith(("http://", "https://")):
        return HttpSource(place)
    return FolderSource(Path(place))

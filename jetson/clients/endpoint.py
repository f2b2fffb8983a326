"""The noun `Endpoint`: where a server listens; and what its clients make of its answers."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from jetson.errors import RemoteError


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens.

    Raises:
        RemoteError: it is not HOST:PORT, or a URL of http or https with a port.
    """

    host: str
    port: int
    encrypted: bool = False

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """Read "robot:8000", "[::1]:8000" or "https://robot:8000"."""
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or not port or parts.scheme not in ("http", "https"):
            raise RemoteError(f"a server is HOST:PORT, or https://HOST:PORT, got {text!r:.100}")
        return cls(host, port, parts.scheme == "https")

    def url(self, scheme: str) -> str:
        """Return the address under a scheme that has an `s` where it is encrypted."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}{'s' if self.encrypted else ''}://{host}:{self.port}"


def checked_actions(array: NDArray[Any]) -> NDArray[np.float32]:
    """Return what a server says are actions.  float32 [horizon, dim]

    Raises:
        RemoteError: they are not finite, or of another rank.
    """
    if array.ndim != 2 or not np.isfinite(array).all():
        raise RemoteError(f"actions must be finite [horizon, dim], got {list(array.shape)}")
    return array.astype(np.float32, copy=False)


def failure(url: str, error: Exception) -> RemoteError:
    """Return the error that a connection failed."""
    reason = str(error) or "no reply in time"
    return RemoteError(f"{url} failed: {type(error).__name__}: {reason:.300}")

"""The noun `ServedRequest`: one request and how it was answered, for whoever watches the server.

Watching costs the robot next to nothing and can never cost it its action: an observer is told
after the action is decided, must not wait, and is dismissed when it fails.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedRequest:
    """What one request held and what came of it."""

    # None where the request could not be read.
    observation: Observation | None
    # None where there is no action.
    chunk: ActionChunk | None
    # Span -> milliseconds; "total" covers them all. Empty where the request was turned away.
    timing_ms: Mapping[str, float]
    # Why there is no action; None where there is one.
    error: QvlaError | None = None


class Observer(Protocol):
    """Whoever watches. Called from the threads that answer, several at once: must not wait."""

    def on_request(self, served: ServedRequest) -> None:
        """Take note of one request."""
        ...


class Observers:
    """Tells every observer; one that raises is logged once and not told again."""

    def __init__(self, observers: tuple[Observer, ...] = ()) -> None:
        self._observers = observers

    def __bool__(self) -> bool:
        return bool(self._observers)

    def on_request(self, served: ServedRequest) -> None:
        """Tell all of them; raises nothing."""
        for observer in self._observers:
            try:
                observer.on_request(served)
            except Exception as error:  # a full disk must not cost the robot its action
                self._observers = tuple(o for o in self._observers if o is not observer)
                _LOG.error(
                    "%s failed and is told no more: %s: %s",
                    type(observer).__name__, type(error).__name__, error,
                )  # fmt: skip

"""Everything that watches a server: metrics, the live page, the board and the recorder."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.routing import BaseRoute

from jetson.board.watch import BoardWatch
from jetson.live.feed import LiveFeed
from jetson.live.routes import live_routes
from jetson.server_settings import ServerSettings
from jetson.serving.metrics import Metrics
from jetson.serving.policy_contract import PolicyContract, processor_of
from jetson.serving.request_observer import Observer, Observers, ServedRequest
from qvla_export.shared.action import ActionPolicy
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from jetson.recording.writer import McapRecorder


@dataclass(frozen=True)
class Watch:
    """Who is told of every request, and where people read what they know."""

    observers: Observers
    routes: list[BaseRoute]
    # Returns what of it does not work, in words.
    faults: Callable[[], list[str]]

    def on_refusal(self, error: QvlaError) -> None:
        """Note a request that was turned away unread."""
        self.observers.on_request(ServedRequest(None, None, {}, error))


@contextlib.contextmanager
def open_watch(
    policy: ActionPolicy, contract: PolicyContract, settings: ServerSettings
) -> Iterator[Watch]:
    """Yield what watches a server; closes the recording, if there is one, at the end.

    Raises:
        RefusedSetting: the recording cannot be made.
    """
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(BoardWatch())
        recorder: McapRecorder | None = None
        if settings.record is not None:
            # Not imported where nobody records: a server's start is silence at a switch.
            from jetson.recording import writer

            recorder = stack.enter_context(
                writer.McapRecorder(
                    settings.record, contract, lambda: board.state, "serve", settings.record_images
                )
            )

        def recording() -> dict[str, Any] | None:
            if recorder is None:
                return None
            counts = {"written": recorder.written, "dropped": recorder.dropped}
            return {"file": recorder.path.name, **counts, "failure": recorder.failure}

        processor = processor_of(policy)
        metrics = Metrics(
            contract,
            lambda: board.state,
            settings.deadline_ms,
            lambda: 0 if recorder is None else recorder.dropped,
            recording_up=None if recorder is None else (lambda: recorder.failure is None),
        )
        feed = LiveFeed(
            contract,
            lambda: board.state,
            None if processor is None else processor.command_limits,
            settings.deadline_ms,
            recording,
        )
        observers: tuple[Observer, ...] = (metrics, feed)
        if recorder is not None:
            observers = (*observers, recorder)

        def faults() -> list[str]:
            found = [] if board.is_sampling else ["the board is not sampled any more"]
            if recorder is not None and recorder.failure is not None:
                found.append("nothing is recorded any more")
            return found

        yield Watch(Observers(observers), live_routes(feed, metrics), faults)

"""The queue of requests before the one engine: bounded, shared by all protocols.

`ActionService` lets one inference run at a time. A websocket or ZMQ client is answered by the
thread that reads its socket; HTTP, whose event loop must not wait, has one thread more. Where an
inference does not end, those threads cannot say so: a watcher does.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from jetson.errors import ServerBusy
from jetson.serving.request_observer import ServedRequest
from jetson.serving.service import ActionService, Answer, Decoder

_LOOK_S = 1.0


class RequestQueue:
    """Admits requests while there is room for them. A context manager."""

    def __init__(self, service: ActionService, max_pending: int) -> None:
        self.service = service
        self._max_pending = max_pending
        self._lock = threading.Lock()
        self._pending = 0
        self._draining = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qvla-action")
        # Called, on a thread of the queue's, while an inference does not end; must not wait.
        self.on_stuck: list[Callable[[ServerBusy], None]] = []
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="qvla-stuck", daemon=True)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place from when the body is there, undecoded, until the reply is sent.

        Raises:
            ServerBusy: there is none left, or the server shuts down.
        """
        if fault := self.service.fault:
            raise self._busy(fault)
        with self._lock:
            if self._draining:
                raise self._busy("the server is shutting down; ask again once it is back")
            if self._pending >= self._max_pending:
                raise self._busy(
                    f"{self._pending} requests are waiting, the limit is {self._max_pending}; "
                    "send the next one after the last reply"
                )
            self._pending += 1
        try:
            yield
        finally:
            with self._lock:
                self._pending -= 1

    @property
    def fault(self) -> str | None:
        """Why requests are refused; None while they are not."""
        return "the server is shutting down" if self._draining else self.service.fault

    def _busy(self, reason: str) -> ServerBusy:
        error = ServerBusy(reason)
        self.service.observers.on_request(ServedRequest(None, None, {}, error))
        return error

    async def answer(self, body: bytes, decode: Decoder, wanted: Callable[[], bool]) -> Answer:
        """Await the answer to a request without holding up the event loop."""
        loop = asyncio.get_running_loop()
        answered = loop.run_in_executor(self._thread, self.service.answer, body, decode, wanted)
        while not (await asyncio.wait({answered}, timeout=_LOOK_S))[0]:
            # One that waits behind an engine that does not come back is told so.
            self.service.require_alive()
        return answered.result()

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests and wait, at most so long, until those under way are answered."""
        with self._lock:
            self._draining = True
        end_s = time.monotonic() + limit_s
        while self._pending and time.monotonic() < end_s:
            await asyncio.sleep(0.01)

    def __enter__(self) -> "RequestQueue":
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.shutdown()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            try:
                self.service.require_alive()
            except ServerBusy as error:
                for tell in tuple(self.on_stuck):
                    tell(error)

"""The one thread that answers, and the bounded line of requests before it.

All protocols share it: an engine is not re-entrant, and a CUDA context belongs to a thread.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jetson.errors import ServerBusy
from jetson.service import ActionService, Answer, Decoder
from qvla_export.observation import Observation


class ActionWorker:
    """Answers one request after another, first come first served. A context manager."""

    def __init__(self, service: ActionService, max_pending: int) -> None:
        self.service = service
        self._max_pending = max_pending
        self._lock = threading.Lock()
        self._pending = 0
        self._draining = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qvla-action")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the line from before the body is read until the reply is sent.

        Raises:
            ServerBusy: there is none left, or the server shuts down.
        """
        with self._lock:
            if self._draining:
                raise ServerBusy("the server is shutting down; ask again once it is back")
            if self._pending >= self._max_pending:
                raise ServerBusy(
                    f"{self._pending} requests are waiting, the limit is {self._max_pending}; "
                    "send the next one after the last reply"
                )
            self._pending += 1
        try:
            yield
        finally:
            with self._lock:
                self._pending -= 1

    def warm_up(self, count: int, observation: Observation | None = None) -> float:
        """Let the thread that will answer act `count` times; see `ActionService.warm_up`."""
        return self._thread.submit(self.service.warm_up, count, observation).result()

    def submit(self, body: Any, decode: Decoder) -> "Future[Answer]":
        """Answer a request on the worker's thread, after those submitted before."""
        return self._thread.submit(self.service.answer, body, decode)

    async def answer(self, body: Any, decode: Decoder) -> Answer:
        """Await the answer to a request without holding up the event loop."""
        return await asyncio.wrap_future(self.submit(body, decode))

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests and wait, at most so long, until those under way are answered."""
        with self._lock:
            self._draining = True
        end_s = time.monotonic() + limit_s
        while self._pending and time.monotonic() < end_s:
            await asyncio.sleep(0.01)

    def __enter__(self) -> "ActionWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

"""The live page and `/metrics` of a control loop, from within its process.

The loop calls a recorder; `LoopWatch` is one that tells the page's observers as the server does,
and passes everything on to the recorder that writes, if there is one.
"""

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware

from jetson.board.watch import BoardWatch
from jetson.control.chunks import TimedChunk
from jetson.control.records import Counters, Recorder, StepRecord
from jetson.control.safety import ActionSafety
from jetson.control.sources import TimedObservation
from jetson.errors import RefusedSetting
from jetson.live.feed import LiveFeed
from jetson.live.routes import live_routes
from jetson.server_settings import ServerSettings
from jetson.serving.guard import Guard
from jetson.serving.metrics import Metrics
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.request_observer import Observers, ServedRequest
from jetson.serving.security import Gate, RateLimit
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.normalization import Bounds


class LoopWatch:
    """A `Recorder` of the control loop that feeds the page. Called from the control thread."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        # Both are set once they exist; the loop wants its recorder first.
        self.observers = Observers()
        self.counters = Counters()
        self._recorder = recorder
        self._seen: TimedObservation | None = None
        self._step: StepRecord | None = None

    def on_observation(self, observation: TimedObservation) -> None:
        """Keep it until its chunk comes."""
        self._seen = observation
        if self._recorder is not None:
            self._recorder.on_observation(observation)

    def on_chunk(self, chunk: TimedChunk) -> None:
        """Tell what came of the newest observation."""
        seen = self._seen
        if seen is not None and seen.observed_s == chunk.observed_s:
            made = ActionChunk(chunk.actions, chunk.actions, chunk.timing_ms)
            self.observers.on_request(ServedRequest(seen.observation, made, chunk.timing_ms))
        if self._recorder is not None:
            self._recorder.on_chunk(chunk)

    def on_step(self, record: StepRecord) -> None:
        """Keep the newest slot."""
        self._step = record
        if self._recorder is not None:
            self._recorder.on_step(record)

    @property
    def failure(self) -> str | None:
        """Why the recorder behind it keeps nothing any more."""
        return None if self._recorder is None else self._recorder.failure

    @property
    def is_recorded(self) -> bool:
        """Whether there is a recorder behind it."""
        return self._recorder is not None

    def recording(self) -> dict[str, Any] | None:
        """Return what the page says of the recording; None where there is none."""
        recorder = self._recorder
        if recorder is None:
            return None
        counts = {name: getattr(recorder, name, 0) for name in ("written", "dropped")}
        return {"file": getattr(recorder, "path", Path("run")).name, **counts} | {
            "failure": recorder.failure
        }

    def close(self) -> None:
        """Close the recorder behind it."""
        if self._recorder is not None:
            self._recorder.close()

    def snapshot(self) -> dict[str, Any] | None:
        """Return the newest slot and the counts, as the page shows them; None before any."""
        step = self._step
        if step is None:
            return None
        return {
            "slot": step.slot,
            "state": step.state.value,
            "command": step.action,
            "late_ms": step.late_ms,
            "age_ms": step.age_ms,
            "events": list(step.events),
            "counters": asdict(self.counters),
        }


@contextlib.contextmanager
def live_page(
    watch: LoopWatch,
    contract: PolicyContract,
    safety: ActionSafety,
    address: str,
    token: str | None = None,
) -> Iterator[str]:
    """Serve page and metrics of a loop for the duration of a block; yields the URL.

    Args:
        watch: given to the loop as its recorder.
        contract: of the policy.
        safety: its limits are the page's.
        address: PORT on loopback, or HOST:PORT; port 0 takes a free one.
        token: what a browser must know; needed for other addresses than loopback.

    Raises:
        RefusedSetting: the address is none, is taken, or is open to others without a token.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise RefusedSetting(f"the live page's address is PORT or HOST:PORT, got {address!r}")
    settings = ServerSettings(host.strip("[]") or "127.0.0.1", int(port), token=token)
    with BoardWatch() as board, _listening(settings) as bound:
        metrics = Metrics(
            contract,
            lambda: board.state,
            counters=lambda: asdict(watch.counters),
            recording_up=(lambda: watch.failure is None) if watch.is_recorded else None,
        )
        low, high = safety.low.astype(np.float64), safety.high.astype(np.float64)
        limits = Bounds(low, high, np.ones(low.size, bool))
        feed = LiveFeed(
            contract, lambda: board.state, limits, recording=watch.recording, loop=watch.snapshot
        )
        watch.observers = Observers((metrics, feed))
        gate = Gate(token, (settings.host.lower(),), RateLimit(settings.max_rate_hz))
        app = Starlette(
            routes=live_routes(feed, metrics), middleware=[Middleware(Guard, gate=gate)]
        )
        with _serving(app, bound):
            where, taken = bound.getsockname()[:2]
            yield f"http://[{where}]:{taken}" if ":" in where else f"http://{where}:{taken}"


@contextlib.contextmanager
def _serving(app: Starlette, bound: socket.socket) -> Iterator[None]:
    config = uvicorn.Config(
        app, lifespan="off", ws="none", access_log=False, log_config=None, server_header=False,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [bound]}, name="qvla-live", daemon=True
    )
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=5.0)


def _listening(settings: ServerSettings) -> socket.socket:
    try:
        version = ipaddress.ip_address(settings.host).version
    except ValueError:
        version = 4
    try:
        return socket.create_server(
            (settings.host, settings.port),
            family=socket.AF_INET6 if version == 6 else socket.AF_INET,
        )
    except OSError as error:
        raise RefusedSetting(
            f"the live page cannot listen on {settings.host}:{settings.port}: "
            f"{error.strerror or error}; choose another --live"
        ) from None

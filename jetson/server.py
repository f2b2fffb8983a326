"""The action server: `POST /act`, `GET /healthz`, `GET /metadata` on Starlette and uvicorn.

The event loop only moves bytes; requests are answered one after another on one thread. The
port opens after warm-up and closes, on SIGTERM, after the requests under way are answered.
"""

import asyncio
import contextlib
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from jetson.contract import PolicyContract
from jetson.errors import (
    RefusedSetting,
    RequestTooLarge,
    RequestTooSlow,
    ServerBusy,
    WireError,
    http_status,
)
from jetson.service import ActionService, Answer, error_body
from jetson.settings import ServerSettings
from jetson.wire import REPLIES, Reply
from qvla_export.action import ActionPolicy
from qvla_export.errors import QvlaError
from qvla_export.observation import Observation

_LOG = logging.getLogger(__name__)
_NOT_A_TOKEN = re.compile(r"[^A-Za-z0-9_.-]")
# A robot that pauses between actions keeps its connection.
_KEEP_ALIVE_S = 300


def create_app(
    policy: ActionPolicy | ActionService,
    settings: ServerSettings,
    contract: PolicyContract | None = None,
) -> Starlette:
    """Return the ASGI application that serves one policy.

    Raises:
        RefusedSetting: the policy does not say what it needs and no contract is given.
    """
    service = policy if isinstance(policy, ActionService) else ActionService(policy, contract)
    routes = _Routes(service, settings)
    return Starlette(
        routes=[
            Route("/act", routes.act, methods=["POST"]),
            Route("/healthz", routes.healthz, methods=["GET"]),
            Route("/metadata", routes.metadata, methods=["GET"]),
        ],
        exception_handlers={HTTPException: routes.refused},
        lifespan=routes.lifespan,
    )


def serve(
    policy: ActionPolicy,
    settings: ServerSettings,
    contract: PolicyContract | None = None,
    warmup: Observation | None = None,
    on_open: Callable[[str], None] = lambda url: _LOG.info("serving on %s", url),
) -> None:
    """Warm up, open the port and serve until SIGTERM or SIGINT; then drain and return.

    Args:
        policy: the policy; only one inference runs at a time.
        settings: address, limits and reply forms.
        contract: what the policy needs; by default its processor's.
        warmup: a typical observation; by default blank images.
        on_open: called with the URL once clients can connect.

    Raises:
        RefusedSetting: the address is refused or taken.
        PolicyFailure: the policy does not act on a valid observation.
    """
    service = ActionService(policy, contract)
    with _bound(settings) as bound:
        first_ms = service.warm_up(settings.warmup, warmup)
        _LOG.info("warmed up, first action %.1f ms", first_ms)
        server = _Server(_configuration(service, settings))
        server.on_open = lambda: on_open(_url(bound))
        with _quiet_signals():
            server.run(sockets=[bound])


@contextlib.contextmanager
def running_server(
    policy: ActionPolicy,
    settings: ServerSettings,
    contract: PolicyContract | None = None,
    warmup: Observation | None = None,
) -> Iterator[str]:
    """Serve on a thread for the duration of a block; yields the URL. Port 0 takes a free one."""
    service = ActionService(policy, contract)
    with _bound(settings) as bound:
        service.warm_up(settings.warmup, warmup)
        server = uvicorn.Server(_configuration(service, settings))
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [bound]}, name="qvla-server", daemon=True
        )
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RefusedSetting(f"the server on {_url(bound)} stopped; see the log")
                time.sleep(0.005)
            yield _url(bound)
        finally:
            server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    """Tells when clients can connect, which is after `startup` and not before."""

    on_open: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_open()


class _Routes:
    """The handlers and what they share."""

    def __init__(self, service: ActionService, settings: ServerSettings) -> None:
        self._service = service
        self._settings = settings
        self._pending = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="qvla-action")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self._worker.shutdown()

    async def act(self, request: Request) -> Response:
        try:
            answer = await self._answer(request)
        except ClientDisconnect:
            _LOG.info("a client left before its request was complete")
            return Response(status_code=400)
        except QvlaError as error:
            _LOG.warning("no action: %s", error)
            answer = Answer(http_status(error), error_body(error), {})
            # The body may not have been read to its end, and will not be.
            headers = {"connection": "close"}
        else:
            headers = {"server-timing": _server_timing(answer.timing_ms)}
        if answer.status != 200 and self._settings.strict_compat:
            return JSONResponse("error", headers=headers)
        return Response(answer.body, answer.status, headers, "application/json")

    async def _answer(self, request: Request) -> Answer:
        reply = _reply(request, self._settings)
        if self._pending >= self._settings.max_pending:
            raise ServerBusy(
                f"{self._pending} requests are waiting, the limit is {self._settings.max_pending}; "
                "send the next one after the last reply"
            )
        self._pending += 1
        try:
            body = await _read_body(request, self._settings)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._worker, self._service.answer, body, reply)
        finally:
            self._pending -= 1

    async def healthz(self, request: Request) -> Response:
        return PlainTextResponse("OK")

    async def metadata(self, request: Request) -> Response:
        return JSONResponse(self._service.contract.to_json())

    async def refused(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        reason = (
            f"{request.method} {request.url.path} is not served; "
            "use POST /act, GET /healthz or GET /metadata"
        )
        headers = error.headers if isinstance(error, HTTPException) else None
        return JSONResponse({"error": reason, "kind": "NotServed"}, status, headers)


def _reply(request: Request, settings: ServerSettings) -> Reply:
    asked = request.query_params.get("reply", settings.reply)
    for known in REPLIES:
        if asked == known:
            return known
    raise WireError(f"reply must be one of {list(REPLIES)}, got {asked!r:.40}")


async def _read_body(request: Request, settings: ServerSettings) -> bytes:
    limit = settings.max_body_bytes
    too_large = RequestTooLarge(
        f"the body may have {limit} bytes; send smaller images or raise the server's limit"
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_large

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), settings.body_timeout_s)
    except asyncio.TimeoutError:
        raise RequestTooSlow(
            f"the body did not arrive within {settings.body_timeout_s:g} s"
        ) from None


def _server_timing(timing_ms: Mapping[str, float]) -> str:
    """Return W3C `Server-Timing`: stages in order, durations in milliseconds."""
    return ", ".join(
        f"{_NOT_A_TOKEN.sub('_', name)};dur={ms:.4f}" for name, ms in timing_ms.items()
    )


def _configuration(service: ActionService, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(service, settings),
        http="h11",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_s,
    )


@contextlib.contextmanager
def _bound(settings: ServerSettings) -> Iterator[socket.socket]:
    """Yield a socket that holds the address but, until uvicorn listens, refuses connections."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; without it every
    # reply waits 40 ms for the client's delayed acknowledgement.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((settings.host, settings.port))
        except OSError as error:
            raise RefusedSetting(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; "
                "stop what uses it or choose another --port"
            ) from None
        yield bound


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def _quiet_signals() -> Iterator[None]:
    """Let uvicorn's re-raised SIGTERM and SIGINT end in a normal return after draining."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

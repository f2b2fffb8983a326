"""The action server: every protocol on one policy, in one process.

    port         HTTP and websockets on Starlette and uvicorn
                 POST /act        OpenVLA and OpenVLA-OFT      jetson.serving.protocols.act
                 websocket        openpi                       jetson.serving.protocols.openpi
                 /vla-eval        AI2's harness, a websocket   jetson.serving.protocols.vla_eval
                 GET /healthz (alive), GET /readyz (able to act), GET /metadata, GET /metrics
                 GET /            the live page                jetson.live
    gr00t port   ZMQ, if asked for                             jetson.serving.protocols.gr00t

One inference runs at a time, whoever asks. The ports open after warm-up and close, on SIGTERM,
after the requests under way are answered.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from jetson.errors import RETRY_AFTER_S, RefusedSetting
from jetson.observers import Watch, open_watch
from jetson.server_settings import ServerSettings
from jetson.serving.byte_budget import ByteBudget
from jetson.serving.connections import Connections, client_places, connection_limit
from jetson.serving.event_loop import ServingLoop, quiet_without_descriptors
from jetson.serving.guard import Guard
from jetson.serving.http_protocol import HttpConnection
from jetson.serving.object_rings import rings_collected_early
from jetson.serving.policy_contract import PolicyContract, contract_of, require_no_history
from jetson.serving.protocols.act import ActEndpoint
from jetson.serving.protocols.websocket_route import websocket_route
from jetson.serving.request_queue import RequestQueue
from jetson.serving.security import Gate, RateLimit
from jetson.serving.service import ActionService
from jetson.serving.systemd_notify import notify, signs_of_life
from jetson.serving.upgrade import WebsocketThreads
from qvla_export.shared.action import ActionPolicy
from qvla_export.shared.allocator import return_freed_memory
from qvla_export.shared.observation import Observation

_LOG = logging.getLogger(__name__)
# Largest bodies that the memory may hold at the same time.
_BODIES_AT_ONCE = 4
# A robot that pauses between actions keeps its connection.
_KEEP_ALIVE_S = 300
# Between looks for freed memory that lies between what is still in use.
_RETURN_MEMORY_S = 20


def create_app(
    queue: RequestQueue, settings: ServerSettings, gate: Gate, watch: Watch, budget: ByteBudget
) -> Starlette:
    """Return the ASGI application: HTTP, behind its guard."""
    contract = queue.service.contract.to_json()

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("OK\n")

    async def readyz(request: Request) -> Response:
        faults = [*filter(None, (queue.fault,)), *watch.faults()]
        if not faults:
            return PlainTextResponse("ready\n")
        return JSONResponse({"not_ready": faults}, 503, {"retry-after": str(RETRY_AFTER_S)})

    async def metadata(request: Request) -> Response:
        return JSONResponse(contract)

    return Starlette(
        routes=[
            Route("/act", ActEndpoint(queue, settings, budget).act, methods=["POST"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/readyz", readyz, methods=["GET"]),
            Route("/metadata", metadata, methods=["GET"]),
            *watch.routes,
        ],
        middleware=[Middleware(Guard, gate=gate)],
        exception_handlers={HTTPException: _not_served, Exception: _own_failure},
    )


def serve(
    policy: ActionPolicy,
    settings: ServerSettings,
    contract: PolicyContract | None = None,
    warmup: Observation | None = None,
    on_open: Callable[[str], None] = lambda url: _LOG.info("serving on %s", url),
) -> None:
    """Warm up, open the ports and serve until SIGTERM or SIGINT; then drain and return.

    Args:
        policy: the policy; only one inference runs at a time.
        settings: addresses, limits, credentials and reply forms.
        contract: what the policy needs; by default its processor's.
        warmup: a typical observation; by default blank images.
        on_open: called with the URL once clients can connect.

    Raises:
        RefusedSetting: an address is refused or taken.
        PolicyFailure: the policy does not act on a valid observation.
    """
    ready = _ready(policy, settings, contract, warmup)
    with ready as (server, bound), rings_collected_early(), _quiet_signals():

        def opened() -> None:
            on_open(_url(bound, settings))
            notify("READY=1")

        server.on_open = opened
        server.run(sockets=[bound])
        notify("STOPPING=1")


@contextlib.contextmanager
def open_server(
    policy: ActionPolicy,
    settings: ServerSettings,
    contract: PolicyContract | None = None,
    warmup: Observation | None = None,
) -> Iterator[str]:
    """Serve on a thread for the duration of a block; yields the URL. Port 0 takes a free one."""
    with _ready(policy, settings, contract, warmup) as (server, bound):
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [bound]}, name="qvla-server", daemon=True
        )
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    url = _url(bound, settings)
                    raise RefusedSetting(f"the server on {url} stopped; see the log")
                time.sleep(0.005)
            yield _url(bound, settings)
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def _ready(
    policy: ActionPolicy,
    settings: ServerSettings,
    contract: PolicyContract | None,
    warmup: Observation | None,
) -> Iterator[tuple["_Server", socket.socket]]:
    """Yield a server that only has to run: addresses held, warmed up, ZMQ open."""
    named = (contract or contract_of(policy)).named(settings.field_names, settings.instruction)
    require_no_history(policy)
    service = ActionService(policy, named, settings.infer_timeout_s)
    rate = RateLimit(settings.max_rate_hz)
    gate = Gate(settings.token, (*settings.allowed_hosts, settings.host.lower()), rate)
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(_bound(settings))
        queue = stack.enter_context(RequestQueue(service, settings.max_pending))
        first_ms = service.warm_up(settings.warmup, warmup)
        _LOG.info("warmed up, first action %.1f ms", first_ms)
        watch = stack.enter_context(open_watch(policy, service.contract, settings))
        service.observers = watch.observers
        gate.on_refusal = watch.on_refusal
        if settings.token and settings.tls is None and not settings.on_loopback:
            _LOG.warning("the token travels readable; give --tls-cert and --tls-key to encrypt")
        budget = ByteBudget(_BODIES_AT_ONCE * settings.max_body_bytes)
        threads = stack.enter_context(
            WebsocketThreads(
                websocket_route(queue, rate),
                gate,
                client_places(settings.max_connections, "websocket clients"),
                budget,
                settings.max_body_bytes,
            )
        )
        queue.on_stuck.append(threads.give_up)
        if settings.gr00t_port is not None:
            # Not imported where nobody asks for it: it takes longer than all the rest.
            from jetson.serving.protocols.gr00t import Gr00tEndpoint

            stack.enter_context(Gr00tEndpoint(queue, settings, rate, budget))
        stack.enter_context(signs_of_life(lambda: queue.fault is None))
        app = create_app(queue, settings, gate, watch, budget)
        yield _Server(_configuration(app, threads, settings), queue, threads), bound


class _Server(uvicorn.Server):
    """Tells when clients can connect, and closes no connection before its reply is sent."""

    def __init__(
        self, config: uvicorn.Config, queue: RequestQueue, threads: WebsocketThreads
    ) -> None:
        super().__init__(config)
        self._queue = queue
        self._threads = threads
        self.on_open: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        quiet_without_descriptors(asyncio.get_running_loop(), _LOG)
        await super().startup(sockets)
        self.on_open()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self._queue.drain(self.config.timeout_graceful_shutdown or 0)
        # While the event loop still pumps what they say last.
        await asyncio.to_thread(self._threads.end)
        await super().shutdown(sockets)


async def _not_served(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    reason = (
        f"{request.method} {request.url.path} is not served; "
        "use POST /act, GET /healthz, /readyz, /metadata, /metrics, / or the websockets of openpi "
        "(/) and vla-eval (/vla-eval)"
    )
    headers = error.headers if isinstance(error, HTTPException) else None
    return JSONResponse({"error": reason, "kind": "NotServed"}, status, headers)


async def _own_failure(request: Request, error: Exception) -> Response:
    reason = f"the server failed: {type(error).__name__}; see its log"
    return JSONResponse({"error": reason, "kind": "ServerFailure"}, 500)


def _configuration(
    app: Starlette, threads: WebsocketThreads, settings: ServerSettings
) -> uvicorn.Config:
    limit = connection_limit()
    connections = Connections(limit, max(1, limit // 4), "HTTP connections")
    tls: dict[str, Any] = {}
    if settings.tls is not None:
        tls = {"ssl_certfile": settings.tls.certificate, "ssl_keyfile": settings.tls.key}
        if settings.tls.client_ca is not None:
            tls["ssl_ca_certs"] = str(settings.tls.client_ca)
            tls["ssl_cert_reqs"] = ssl.CERT_REQUIRED
    return uvicorn.Config(
        app,
        http=partial(HttpConnection, connections=connections),  # type: ignore[arg-type]  # as ws
        # By its name, as uvicorn takes other loops than its own.
        loop=f"{ServingLoop.__module__}:{ServingLoop.__name__}",
        ws=threads.protocol,  # type: ignore[arg-type]  # uvicorn calls it as it calls a class
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        # A header must not say who the peer is: the rate is counted by it.
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_s,
        callback_notify=_return_memory,
        timeout_notify=_RETURN_MEMORY_S,
        **tls,
    )


async def _return_memory() -> None:
    # Peers that come and go leave holes in the heap, which the C library keeps otherwise.
    await asyncio.to_thread(return_freed_memory)


@contextlib.contextmanager
def _bound(settings: ServerSettings) -> Iterator[socket.socket]:
    """Yield a socket that holds the address but, until uvicorn listens, refuses connections."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; without it every
    # reply waits 40 ms for the client's delayed acknowledgement.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_the_vanished(bound)
        try:
            bound.bind((settings.host, settings.port))
        except OSError as error:
            raise RefusedSetting(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; "
                "stop what uses it or choose another --port"
            ) from None
        yield bound


def _notice_the_vanished(bound: socket.socket) -> None:
    """Let connections end two minutes after a client lost its power or its network."""
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # Linux; accepted connections inherit it
            bound.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _url(bound: socket.socket, settings: ServerSettings) -> str:
    host, port = bound.getsockname()[:2]
    scheme = "http" if settings.tls is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


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

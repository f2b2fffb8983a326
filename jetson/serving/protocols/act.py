"""`POST /act` of OpenVLA and OpenVLA-OFT over HTTP; the bodies are those of `jetson.serving.wire`.

Upstream answers every failure with HTTP 200 and the body "error"; here the status is honest and
the body says why, unless `strict_compat` asks for upstream's form.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from jetson.errors import RETRY_AFTER_S, RequestTooLarge, RequestTooSlow, ServerBusy, WireError
from jetson.server_settings import ServerSettings
from jetson.serving.byte_budget import ByteBudget, HeldBytes
from jetson.serving.connections import Connection
from jetson.serving.request_queue import RequestQueue
from jetson.serving.service import Answer
from jetson.serving.wire import REPLIES, Reply, decode_request
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.json_documents import brief

_LOG = logging.getLogger(__name__)
_NOT_A_TOKEN = re.compile(r"[^A-Za-z0-9_.-]")


class ActEndpoint:
    """Answers `POST /act`."""

    def __init__(self, queue: RequestQueue, settings: ServerSettings, budget: ByteBudget) -> None:
        self._queue = queue
        self._budget = budget
        self._settings = settings

    async def act(self, request: Request) -> Response:
        """Answer one request with actions or the reason why there are none."""
        try:
            answer = await self._answer(request)
        except ClientDisconnect:
            _LOG.info("a client left before its request was complete")
            return Response(status_code=400)
        except QvlaError as error:
            _LOG.warning("no action: %s", error)
            answer = Answer.of_error(error)
            # The body may not have been read to its end, and will not be.
            headers = {"connection": "close"}
            if isinstance(error, ServerBusy):
                headers["retry-after"] = str(RETRY_AFTER_S)
        else:
            if answer.error is not None:
                _LOG.warning("no action: %s", answer.error)
            headers = {"server-timing": _server_timing(answer.timing_ms)}
            if isinstance(answer.error, ServerBusy):
                headers["retry-after"] = str(RETRY_AFTER_S)
        if answer.error is not None and self._settings.strict_compat:
            return JSONResponse("error", headers=headers)
        return Response(answer.body, answer.status, headers, "application/json")

    async def _answer(self, request: Request) -> Answer:
        reply = _reply(request, self._settings)
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        with self._budget.hold(lambda: loop.call_soon_threadsafe(task.cancel)) as held:
            try:
                body = await _read_body(request, self._settings, held)
            except asyncio.CancelledError:
                if held.evicted:
                    raise held.reason() from None
                raise
            # A place is for a request that is there: one that dawdles keeps nobody waiting.
            with self._queue.place():
                decode = partial(decode_request, reply=reply)
                return await self._queue.answer(body, decode, _wanted(request))


def _reply(request: Request, settings: ServerSettings) -> Reply:
    asked = request.query_params.get("reply", settings.reply)
    for known in REPLIES:
        if asked == known:
            return known
    raise WireError(f"reply must be one of {list(REPLIES)}, got {brief(asked)}")


def _wanted(request: Request) -> Callable[[], bool]:
    """Return what says whether the client is still there."""
    connection: Connection | None = getattr(request.state, "connection", None)
    return lambda: connection is None or not connection.is_gone


async def _read_body(request: Request, settings: ServerSettings, held: HeldBytes) -> bytes:
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)

    async def read() -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                held.add(len(part))
                parts.append(part)
            held.complete()
            return b"".join(parts)
        finally:
            # asyncio keeps the frame of a task that failed until garbage is collected.
            parts.clear()

    try:
        return await asyncio.wait_for(read(), settings.body_timeout_s)
    except asyncio.TimeoutError:
        raise RequestTooSlow(
            f"the body did not arrive within {settings.body_timeout_s:g} s"
        ) from None


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"the body may have {limit} bytes; send smaller images or raise the server's limit"
    )


def _server_timing(timing_ms: Mapping[str, float]) -> str:
    """Return W3C `Server-Timing`: spans in order, durations in milliseconds."""
    return ", ".join(
        f"{_NOT_A_TOKEN.sub('_', name)};dur={ms:.4f}" for name, ms in timing_ms.items()
    )

"""What stands before the application: nothing unauthorized, foreign or too frequent gets in."""

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from jetson.errors import Unauthorized, http_status
from jetson.security import RateLimit, check_authorization, check_host, check_origin
from jetson.settings import ServerSettings
from qvla_export.errors import QvlaError

# Says that the server lives and nothing else, to monitors that hold no token.
_OPEN_PATHS = ("/healthz",)


class Guard:
    """ASGI middleware: Host, Origin, token and rate, for HTTP and for websocket upgrades."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, rate: RateLimit) -> None:
        self._app = app
        self._token = settings.token
        self._names = (*settings.allowed_hosts, settings.host.lower())
        self._rate = rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            try:
                self._check(HTTPConnection(scope))
            except QvlaError as error:
                await _refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, connection: HTTPConnection) -> None:
        headers = connection.headers
        check_host(headers.get("host"), self._names)
        check_origin(headers.get("origin"), headers.get("host"))
        if connection.url.path in _OPEN_PATHS:
            return
        # Before the token is looked at: guessing is limited as well.
        self._rate.take(peer_of(connection))
        check_authorization(headers.get("authorization"), self._token)


def peer_of(connection: HTTPConnection) -> str:
    """Return the address of a client, without its port."""
    return connection.client.host if connection.client else "unknown"


async def _refuse(error: QvlaError, scope: Scope, receive: Receive, send: Send) -> None:
    # The body has not been read, and will not be.
    headers = {"connection": "close"}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    reason = {"error": str(error), "kind": type(error).__name__}
    response = JSONResponse(reason, http_status(error), headers)
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(response)
    else:
        await response(scope, receive, send)

"""What stands before HTTP: nothing unauthorized, foreign or too frequent reaches a handler."""

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from jetson.errors import RETRY_AFTER_S, RateLimited, Unauthorized, WireError, http_status
from jetson.serving.security import Gate
from qvla_export.shared.errors import QvlaError

# Say whether the server lives and could act, to monitors that hold no token.
_PUBLIC_PATHS = ("/healthz", "/readyz")


class Guard:
    """ASGI middleware that asks the gate; websocket upgrades pass it before they get here."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            connection = HTTPConnection(scope)
            peer = connection.client.host if connection.client else "unknown"
            try:
                _check_framing(scope)
                self._gate.check(connection.headers, peer, scope["path"] in _PUBLIC_PATHS)
            except QvlaError as error:
                # Browsers ask people for the token if told to; programs are not asked.
                scheme = 'Basic realm="QVLA"' if scope["method"] == "GET" else "Bearer"
                await _refusal(error, scheme)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _check_framing(scope: Scope) -> None:
    """Refuse a request that says its length in two ways: proxies would read two requests.

    Raises:
        WireError: it does (RFC 9112, section 6.1); the connection is closed.
    """
    names = {name for name, _ in scope["headers"]}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise WireError("a request has Content-Length or Transfer-Encoding, not both")


def _refusal(error: QvlaError, scheme: str) -> JSONResponse:
    # The body has not been read, and will not be.
    headers = {"connection": "close"}
    if isinstance(error, RateLimited):
        headers["retry-after"] = str(RETRY_AFTER_S)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = scheme
    reason = {"error": str(error), "kind": type(error).__name__}
    return JSONResponse(reason, http_status(error), headers)

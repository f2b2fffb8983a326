"""Errors of the robot side, and the HTTP status each one becomes.

QvlaError
├── InvalidObservation  422  the observation breaks the policy's contract (shared.errors)
├── WireError           400  the bytes are not what the protocol speaks
├── Unauthorized        401  the token is missing or wrong
├── Forbidden           403  the request comes through a browser or a name that is not ours
├── RequestTooSlow      408  the body did not arrive in time
├── RequestTooLarge     413  the body is longer than the server accepts
├── RateLimited         429  one peer asks more often than the server allows
├── ClientLeft          400  nobody waits for the action any more
├── ServerBusy          503  too many requests wait for the one engine
├── PolicyFailure       500  the policy failed or returned no usable action
├── RefusedSetting           a server setting that is unsafe or impossible
├── CommandNotTaken          the robot's driver has not taken the last command
└── RemoteError              a remote server cannot be reached, or answered with an error
"""

from qvla_export.shared.errors import InvalidObservation, QvlaError

# Seconds after which it makes sense to ask a busy server again.
RETRY_AFTER_S = 1


class WireError(QvlaError):
    """The bytes are not what the protocol speaks."""


class Unauthorized(QvlaError):
    """The token is missing or wrong."""


class Forbidden(QvlaError):
    """The request comes through a browser or a name that is not ours."""


class RequestTooLarge(QvlaError):
    """The body is longer than the server accepts."""


class RequestTooSlow(QvlaError):
    """The body did not arrive in time."""


class RateLimited(QvlaError):
    """One peer asks more often than the server allows."""


class ClientLeft(QvlaError):
    """Nobody waits for the action any more: it is not computed."""


class ServerBusy(QvlaError):
    """Too many requests wait for the one engine, or there is no room for one more client."""

    def __init__(self, reason: str) -> None:
        """Say why, and when to ask again: in every protocol alike."""
        super().__init__(f"{reason} (overloaded: retry after {RETRY_AFTER_S} s)")


class PolicyFailure(QvlaError):
    """The policy failed or returned no usable action."""


class RefusedSetting(QvlaError):
    """A server setting that is unsafe or impossible."""


class RemoteError(QvlaError):
    """A remote server cannot be reached, or answered with an error."""


class CommandNotTaken(QvlaError):
    """The robot's driver has not taken the last command; the new one is dropped, not queued."""


_STATUS: tuple[tuple[type[QvlaError], int], ...] = (
    (InvalidObservation, 422),
    (WireError, 400),
    (Unauthorized, 401),
    (Forbidden, 403),
    (RequestTooSlow, 408),
    (RequestTooLarge, 413),
    (RateLimited, 429),
    (ClientLeft, 400),
    (ServerBusy, 503),
)


def forget_frames(error: BaseException) -> None:
    """Let go of what the frames hold that an error came through; once it is logged.

    A request's body is among it. A frame that holds the error holds itself, and is freed by the
    garbage collector alone, which may be thousands of requests away.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None


def http_status(error: Exception) -> int:
    """Return the HTTP status of an error; whatever is not the client's fault is 500."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)

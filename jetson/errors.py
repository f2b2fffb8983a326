"""Errors of the robot side, and the HTTP status each one becomes.

QvlaError
├── InvalidObservation  422  the observation breaks the policy's contract (qvla_export.errors)
├── WireError           400  the bytes are not the JSON and json-numpy that the protocol speaks
├── RequestTooLarge     413  the body is longer than the server accepts
├── RequestTooSlow      408  the body did not arrive in time
├── ServerBusy          503  too many requests wait for the one engine
├── PolicyFailure       500  the policy failed or returned no usable action
├── RefusedSetting           a server setting that is unsafe or impossible
└── RemoteError              a remote server cannot be reached, or answered with an error
"""

from qvla_export.errors import InvalidObservation, QvlaError


class WireError(QvlaError):
    """The bytes are not the JSON and json-numpy that the protocol speaks."""


class RequestTooLarge(QvlaError):
    """The body is longer than the server accepts."""


class RequestTooSlow(QvlaError):
    """The body did not arrive in time."""


class ServerBusy(QvlaError):
    """Too many requests wait for the one engine."""


class PolicyFailure(QvlaError):
    """The policy failed or returned no usable action."""


class RefusedSetting(QvlaError):
    """A server setting that is unsafe or impossible."""


class RemoteError(QvlaError):
    """A remote server cannot be reached, or answered with an error."""


_STATUS: tuple[tuple[type[QvlaError], int], ...] = (
    (InvalidObservation, 422),
    (WireError, 400),
    (RequestTooLarge, 413),
    (RequestTooSlow, 408),
    (ServerBusy, 503),
)


def http_status(error: Exception) -> int:
    """Return the HTTP status of an error; whatever is not the client's fault is 500."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)

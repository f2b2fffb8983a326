"""Who may ask for actions: a token or a client certificate, from where, and how often.

On loopback everybody who has an account on the robot may; a browser there may not act for the
pages it shows (Origin), nor for a name that somebody else resolves to loopback (Host). Any other
address needs a token or client certificates (mTLS). `Gate` holds this before HTTP and websockets;
ZMQ has no such headers, a browser cannot speak it, and shares the token and the rate.
"""

import base64
import hmac
import ipaddress
import os
import re
import ssl
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from jetson.errors import Forbidden, RateLimited, RefusedSetting, Unauthorized
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.json_documents import brief

TOKEN_VARIABLE = "QVLA_TOKEN"
# 16 characters of base64 are 96 bits: no rate of guessing finds them.
_TOKEN = re.compile(r"[!-~]{16,512}", re.ASCII)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:]+)(:\d{1,5})?", re.ASCII)
# Buckets that are kept; the peer longest silent is forgotten first, its bucket is full by then.
_MAX_PEERS = 1024


def read_token(path: Path | None = None) -> str | None:
    """Return the token from a file, else from the environment's QVLA_TOKEN, else None.

    Raises:
        RefusedSetting: the file cannot be read or others may read it, or the token is short.
    """
    if path is None:
        token = os.environ.get(TOKEN_VARIABLE)
        return None if token is None else require_token(token.strip(), TOKEN_VARIABLE)
    try:
        mode = path.stat().st_mode
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedSetting(
            f"the token file {path} cannot be read: {error}; make one: "
            f"(umask 077; openssl rand -hex 32 > {path})"
        ) from None
    if mode & stat.S_IROTH:
        raise RefusedSetting(f"everybody may read the token file {path}; run: chmod 600 {path}")
    return require_token(token, str(path))


def require_token(token: str, source: str) -> str:
    """Return a token that cannot be guessed and fits into a header.

    Raises:
        RefusedSetting: it is shorter than 16 or has other than visible ASCII characters.
    """
    if not _TOKEN.fullmatch(token):
        raise RefusedSetting(
            f"a token must be 16 to 512 visible ASCII characters, {source} holds {len(token)}; "
            "make one: openssl rand -hex 32"
        )
    return token


def check_token(given: object, token: str | None) -> None:
    """Compare in a time that says nothing about the token. No token set: everybody passes.

    Raises:
        Unauthorized: it is another, or none.
    """
    if token is None:
        return
    told = given if isinstance(given, str) else ""
    if not hmac.compare_digest(told.encode("utf-8", "replace"), token.encode()):
        raise Unauthorized(
            f"this server needs its token, got {'another' if told else 'none'}; send the header "
            "'Authorization: Bearer <token>' (openpi-client: api_key=, GR00T: api_token=)"
        )


def check_authorization(header: str | None, token: str | None) -> None:
    """Check `Authorization: Bearer <token>`, or `Api-Key <token>` as openpi-client sends it.

    `Basic` with the token as the password is what browsers send for the live page.

    Raises:
        Unauthorized: the header is missing or holds something else.
    """
    scheme, _, given = (header or "").partition(" ")
    given = given.strip() if scheme.lower() in ("bearer", "api-key", "basic") else ""
    check_token(_password(given) if scheme.lower() == "basic" else given, token)


def _password(credentials: str) -> str:
    """Return the password of base64 "user:password"; empty where there is none."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def check_host(host: str | None, names: tuple[str, ...]) -> None:
    """Accept addresses, localhost and the names given: whoever rebinds DNS needs another name.

    Raises:
        Forbidden: the Host header is missing or names something else.
    """
    found = _HOST.fullmatch(host or "")
    name = found[1].strip("[]").lower().rstrip(".") if found else ""
    if name != "localhost" and name not in names and not _is_address(name):
        raise Forbidden(
            f"Host {brief(host)} is not this server; use its address, localhost or start it with "
            "--allow-host NAME"
        )


def check_origin(origin: str | None, host: str | None) -> None:
    """Accept programs, which send no Origin, and pages that this server itself has sent.

    Raises:
        Forbidden: a page of another origin made the browser ask.
    """
    if origin is None:
        return
    try:
        own = urlsplit(origin).netloc.lower() == (host or "").lower() != ""
    except ValueError:
        own = False
    if not own:
        raise Forbidden(f"Origin {brief(origin)} may not use this server; robots send none")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class RateLimit:
    """A token bucket a peer: `rate_hz` in the long run, twice that at once. Thread-safe."""

    def __init__(self, rate_hz: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._rate_hz = rate_hz
        self._now_s = now_s
        self._lock = threading.Lock()
        # Peer -> requests left, and when that was true.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, peer: str) -> None:
        """Count one request.

        Raises:
            RateLimited: the peer has none left.
        """
        if not self._rate_hz:
            return
        now_s, most = self._now_s(), max(2 * self._rate_hz, 1.0)
        with self._lock:
            left, then_s = self._buckets.pop(peer, (most, now_s))
            left = min(most, left + (now_s - then_s) * self._rate_hz)
            self._buckets[peer] = (left - 1 if left >= 1 else left, now_s)
            if len(self._buckets) > _MAX_PEERS:
                self._buckets.popitem(last=False)
        if left < 1:
            raise RateLimited(
                f"{peer} asks more than {self._rate_hz:g} times a second; wait, or raise "
                "the server's --max-rate-hz"
            )


class Headers(Protocol):
    """Request headers by lower-case name, of whichever library."""

    def get(self, name: str, /) -> str | None:
        """Return a header's value, or None."""
        ...


class Gate:
    """What a request must show before anything else of it is looked at."""

    def __init__(self, token: str | None, names: tuple[str, ...], rate: RateLimit) -> None:
        self._token = token
        self._names = names
        self.rate = rate
        # Told of everything that is refused.
        self.on_refusal: Callable[[QvlaError], None] = lambda error: None

    def check(self, headers: Headers, peer: str, public: bool = False) -> None:
        """Check Host, Origin and, unless what is asked for is public, rate and token.

        Raises:
            Forbidden, RateLimited, Unauthorized: which it is not.
        """
        try:
            self._check(headers, peer, public)
        except QvlaError as error:
            self.on_refusal(error)
            raise

    def _check(self, headers: Headers, peer: str, public: bool) -> None:
        host = headers.get("host")
        check_host(host, self._names)
        check_origin(headers.get("origin"), host)
        if public:
            return
        # Before the token is looked at: guessing is limited as well.
        self.rate.take(peer)
        check_authorization(headers.get("authorization"), self._token)


@dataclass(frozen=True)
class TlsFiles:
    """Certificate and key of the server, and whose certificates clients must show.

    Raises:
        RefusedSetting: a file is missing, or key and certificate do not belong together.
    """

    certificate: Path
    key: Path
    # Certificates of those who may sign clients' certificates; None asks clients for none.
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise RefusedSetting(
                f"TLS needs PEM files: certificate {self.certificate}, key {self.key}, "
                f"client CA {self.client_ca}: {error}"
            ) from None


def client_tls() -> ssl.SSLContext | None:
    """Return how a client trusts servers and shows itself, from the environment.

    QVLA_TLS_CA names who signed the server's certificate, QVLA_TLS_CERT and QVLA_TLS_KEY the
    client's own. None where none is set: servers are then trusted as browsers trust them.

    Raises:
        RefusedSetting: a file is missing or is not what it should be.
    """
    names = ("QVLA_TLS_CA", "QVLA_TLS_CERT", "QVLA_TLS_KEY")
    authority, certificate, key = (os.environ.get(name) or None for name in names)
    if not (authority or certificate or key):
        return None
    try:
        context = ssl.create_default_context(cafile=authority)
        if certificate or key:
            context.load_cert_chain(certificate or "", key)
    except (OSError, ssl.SSLError) as error:
        raise RefusedSetting(f"{', '.join(names)} must name PEM files: {error}") from None
    return context

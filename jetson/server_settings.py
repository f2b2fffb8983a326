"""The noun `ServerSettings`: where the action server listens and what it puts up with."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from jetson.errors import RefusedSetting
from jetson.recording.schemas import Images
from jetson.serving.field_names import FieldNames
from jetson.serving.security import TlsFiles, require_token
from jetson.serving.service import INFER_TIMEOUT_S
from jetson.serving.wire import REPLIES, Reply


@dataclass(frozen=True)
class ServerSettings:
    """Addresses, limits, credentials and reply forms of the action server.

    Raises:
        RefusedSetting: a value is out of range, or other machines could reach the address and
            neither a token nor client certificates keep them out.
    """

    # Address to listen on.
    host: str = "127.0.0.1"
    # TCP port of HTTP and websockets; OpenVLA's and openpi's clients expect 8000, OFT's 8777;
    # 0 takes a free one.
    port: int = 8000
    # TCP port of GR00T's ZMQ protocol, whose clients expect 5555; None serves none.
    gr00t_port: int | None = None
    # What every client must know; None on loopback asks for nothing.
    token: str | None = field(default=None, repr=False)
    # Encryption, and with a client CA the other way to know clients.
    tls: TlsFiles | None = None
    # Names, beside addresses and localhost, that clients may call this machine by. Lower case.
    allowed_hosts: tuple[str, ...] = ()
    # Requests a second of one peer, twice as many at once; 0 sets no limit.
    max_rate_hz: float = 1000.0
    # Longest request body in bytes.
    max_body_bytes: int = 32 << 20
    # Websocket clients at the same time.
    max_connections: int = 32
    # "auto" answers OpenVLA's body with one action and OFT's with the chunk.
    reply: Reply = "auto"
    # Answer every failure as upstream does: HTTP 200 with the body "error".
    strict_compat: bool = False
    # What clients call the policy's cameras and the pieces of its state and action.
    field_names: FieldNames = field(default_factory=FieldNames)
    # What to do where a client does not say; None where each must.
    instruction: str | None = None
    # Requests answered before the ports open.
    warmup: int = 3
    # Requests that may wait for the engine; more are told to come back (503).
    max_pending: int = 16
    # Seconds after which an inference counts as stuck: the server is not ready any more, and
    # requests are told so.
    infer_timeout_s: float = INFER_TIMEOUT_S
    # Seconds within which a request body must have arrived.
    body_timeout_s: float = 30.0
    # Whole seconds that requests under way may take after SIGTERM.
    drain_s: int = 10
    # Milliseconds after which an action counts as missed at /metrics; None counts none.
    deadline_ms: float | None = None
    # MCAP file to write every action to, and how its pictures are kept.
    record: Path | None = None
    record_images: Images = "png"

    def __post_init__(self) -> None:
        if self.reply not in REPLIES:
            raise RefusedSetting(f"reply must be one of {list(REPLIES)}, got {self.reply!r}")
        lowest = {
            "port": 0, "gr00t_port": 1, "max_rate_hz": 0, "max_body_bytes": 1,
            "max_connections": 1, "warmup": 0, "max_pending": 1, "body_timeout_s": 0.001,
            "infer_timeout_s": 0.001,
            "drain_s": 0, "deadline_ms": 0.001,
        }  # fmt: skip
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise RefusedSetting(f"{name} must be >= {low}, got {value}")
        for name in ("port", "gr00t_port"):
            if (getattr(self, name) or 0) > 65535:
                raise RefusedSetting(f"{name} must be in 0..65535, got {getattr(self, name)}")
        if self.token is not None:
            require_token(self.token, "the token")
        if not self.on_loopback:
            self._check_remote()

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the ports."""
        return is_loopback(self.host)

    def _check_remote(self) -> None:
        knows_clients = self.tls is not None and self.tls.client_ca is not None
        if self.token is None and not knows_clients:
            raise RefusedSetting(
                f"host {self.host!r} can be reached from other machines and nothing keeps them "
                "out: give a token (--token-file or QVLA_TOKEN) or client certificates "
                "(--tls-client-ca), or stay on loopback (127.0.0.1, ::1 or localhost) and tunnel "
                "through ssh -L"
            )
        if self.gr00t_port is not None and self.token is None:
            raise RefusedSetting(
                f"the ZMQ port {self.gr00t_port} on {self.host!r} knows clients by the token only; "
                "give one (--token-file or QVLA_TOKEN)"
            )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""The noun `ServerSettings`: where the action server listens and what it puts up with."""

import ipaddress
from dataclasses import dataclass

from jetson.errors import RefusedSetting
from jetson.wire import REPLIES, Reply


@dataclass(frozen=True)
class ServerSettings:
    """Address, limits and reply forms of the action server.

    Raises:
        RefusedSetting: a value is out of range, or the address is not loopback and remote
            clients were not explicitly allowed.
    """

    # Address to listen on.
    host: str = "127.0.0.1"
    # TCP port; OpenVLA's clients expect 8000, OFT's 8777; 0 takes a free one.
    port: int = 8000
    # Listen on an address other machines can reach. There is no authentication yet.
    allow_remote: bool = False
    # Longest request body in bytes.
    max_body_bytes: int = 32 << 20
    # "auto" answers OpenVLA's body with one action and OFT's with the chunk.
    reply: Reply = "auto"
    # Answer every failure as upstream does: HTTP 200 with the body "error".
    strict_compat: bool = False
    # Requests answered before the port opens.
    warmup: int = 3
    # Requests that may wait for the engine; more are told to come back (503).
    max_pending: int = 16
    # Seconds within which a request body must have arrived.
    body_timeout_s: float = 30.0
    # Whole seconds that requests under way may take after SIGTERM.
    drain_s: int = 10

    def __post_init__(self) -> None:
        if self.reply not in REPLIES:
            raise RefusedSetting(f"reply must be one of {list(REPLIES)}, got {self.reply!r}")
        lowest = {
            "port": 0, "max_body_bytes": 1, "warmup": 0, "max_pending": 1,
            "body_timeout_s": 0.001, "drain_s": 0,
        }  # fmt: skip
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise RefusedSetting(f"{name} must be >= {low}, got {getattr(self, name)}")
        if self.port > 65535:
            raise RefusedSetting(f"port must be in 0..65535, got {self.port}")
        if not is_loopback(self.host) and not self.allow_remote:
            raise RefusedSetting(
                f"host must be loopback (127.0.0.1, ::1 or localhost), got {self.host!r}: there is "
                "no authentication yet, so anyone who can reach the port could use the policy. "
                "Tunnel through ssh -L, or pass --allow-remote on a network you trust"
            )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

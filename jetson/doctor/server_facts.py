"""What `qvla serve` needs: a free port, a token nobody else reads, a clock that is right."""

import errno
import os
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path

from jetson.doctor.finding import BoardFinding, Check
from jetson.doctor.machine import Machine
from jetson.errors import RefusedSetting
from jetson.server_settings import is_loopback
from jetson.serving.security import TOKEN_VARIABLE, read_token

_PORT = Check("server port", "a server cannot listen where another process does", "free")
_TOKEN = Check(
    "server token", "who reads it can move the robot", "16 characters or more, readable by you only"
)
_CLOCK = Check(
    "system clock",
    "recordings of two machines cannot be put in order",
    "synchronized",
)


@dataclass(frozen=True)
class ServerFacts:
    """Where the server is to listen, and what is in the way."""

    host: str
    port: int
    # Why the port cannot be taken; empty if it can.
    port_problem: str
    port_is_taken: bool
    # Why the token is refused; empty if it is not, or if there is none.
    token_problem: str
    token_file: Path | None
    has_token: bool


def read_serving(host: str, port: int, token_file: Path | None) -> ServerFacts:
    """Return what stands in the server's way; the port is free again afterwards."""
    problem, taken = "", False
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family[0], socket.SOCK_STREAM) as probe:
            # As the server binds: connections that have ended are not in the way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(family[4])
    except (OSError, OverflowError, UnicodeError) as error:
        problem, taken = str(error), getattr(error, "errno", None) == errno.EADDRINUSE
    token_problem, token = "", None
    try:
        token = read_token(token_file)
    except RefusedSetting as error:
        token_problem = str(error)
    named = token_file is not None or TOKEN_VARIABLE in os.environ
    return ServerFacts(
        host, port, problem, taken, token_problem, token_file, named or token is not None
    )


def check_port(facts: ServerFacts) -> BoardFinding:
    """Look whether the server's port is free."""
    where = f"{facts.host}:{facts.port}"
    if not facts.port_problem:
        return _PORT.ok(f"{where} is free")
    if facts.port_is_taken:
        return _PORT.warning(
            f"{where} is in use",
            f"qvla serve BUNDLE --port {facts.port + 1}; who has it: "
            f"sudo ss -ltnp 'sport = :{facts.port}'",
        )
    return _PORT.error(
        f"{where}: {facts.port_problem}",
        "take an address of: ip -brief address, and a port of 1024 to 65535",
    )


def check_token(facts: ServerFacts) -> BoardFinding:
    """Look whether the server's token is a secret."""
    quoted = shlex.quote(str(facts.token_file or "token"))
    make = f"(umask 077; openssl rand -hex 32 > {quoted})"
    if facts.token_problem:
        mend = f"chmod 600 {quoted}" if "chmod" in facts.token_problem else make
        return _TOKEN.error(facts.token_problem, mend)
    if facts.has_token:
        return _TOKEN.ok(str(facts.token_file or TOKEN_VARIABLE))
    if is_loopback(facts.host):
        return _TOKEN.inapplicable("none named, and only this machine reaches the server")
    return _TOKEN.error("none", f"{make}; qvla serve BUNDLE --host {facts.host} --token-file token")


def check_clock(machine: Machine) -> BoardFinding:
    """Look whether the system clock follows a time server."""
    if machine.clock_synchronized is None:
        return _CLOCK.unknown("timedatectl does not answer", "timedatectl status")
    if machine.clock_synchronized:
        return _CLOCK.ok("synchronized")
    return _CLOCK.warning("not synchronized", "sudo timedatectl set-ntp true")

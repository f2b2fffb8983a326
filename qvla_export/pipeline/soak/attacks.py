"""What peers do to a server, by name: slow ones, those that leave, that send what is no request.

Each attack is one round of a fraction of a second; whoever attacks repeats it. What an attacker is
told is counted: a reason is what it should get, an action for a mutated request may be right, and a
failure of the server's own is wrong.
"""

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any

import zmq
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from jetson.clients.protocol_clients import ProtocolName, gr00t_data, openpi_request
from jetson.serving.message_pack import pack, unpack_message
from jetson.serving.structure import REPLY_LIMITS
from jetson.serving.wire import encode_request
from qvla_export.pipeline.soak.numbered_policy import CONTRACT, observation_of
from qvla_export.pipeline.soak.server_process import Address
from qvla_export.pipeline.soak.tally import Tally
from qvla_export.shared.errors import QvlaError

_ATTACKER = 63
_SLOW_PEERS = 24
_TIMEOUT_S = 60.0
_MUTATIONS = 20
_HEAD = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
_UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@dataclass
class Attacker:
    """Whom to attack, with what chance, and what came of it."""

    address: Address
    rng: random.Random
    tallies: dict[ProtocolName, Tally]

    def bodies(self) -> dict[ProtocolName, bytes]:
        """Return a right request of every protocol."""
        seen = observation_of(_ATTACKER, self.rng.randrange(1000))
        gr00t = pack({"endpoint": "get_action", "data": gr00t_data(seen)})
        act = encode_request(seen, CONTRACT)
        return {"act": act, "openpi": openpi_request(seen), "gr00t": gr00t}

    def note(self, protocol: ProtocolName, reason: str | None) -> None:
        """Count a reply: None where it was an action."""
        tally = self.tallies[protocol]
        tally.sent += 1
        if reason is None:
            tally.answered += 1
        else:
            tally.refuse(reason)

    def left(self, protocol: ProtocolName) -> None:
        """Count a request whose reply nobody waited for."""
        self.tallies[protocol].sent += 1
        self.tallies[protocol].refused["left"] += 1


def slow_peers(attacker: Attacker) -> None:
    """Heads, bodies and frames that come a byte at a time, and handshakes that never end."""
    beginnings = (
        b"",
        b"POST /act HT",
        _HEAD % 30_000_000 + b"{",
        _UPGRADE + struct.pack("!BBQ", 0x82, 0x80 | 127, 31 << 20) + bytes(4),
        b"\x16\x03\x01\x02\x00\x01",
    )
    with contextlib.ExitStack() as stack:
        peers = []
        for number in range(_SLOW_PEERS):
            with contextlib.suppress(OSError):
                raw = number % 5 == 4 or not number % 5
                peer = stack.enter_context(_raw(attacker) if raw else attacker.address.connect())
                peer.sendall(beginnings[number % len(beginnings)])
                peers.append(peer)
                attacker.left("openpi" if number % 5 == 3 else "act")
        zmq_peer = stack.enter_context(_zmq_raw(attacker))
        zmq_peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
        attacker.left("gr00t")
        for _ in range(4):
            for peer in peers:
                with contextlib.suppress(OSError):
                    peer.sendall(b" ")
            time.sleep(0.05)


def disconnects(attacker: Attacker) -> None:
    """Leave in the middle of a request, and right after it."""
    bodies = attacker.bodies()
    body = bodies["act"]
    part = attacker.rng.choice([len(body), len(body) // 2, 1])
    with contextlib.suppress(OSError), attacker.address.connect() as peer:
        peer.sendall(_HEAD % len(body) + body[:part])
        attacker.left("act")
    with contextlib.suppress(OSError, WebSocketException), _websocket(attacker) as client:
        client.send(bodies["openpi"])
        client.socket.shutdown(socket.SHUT_RDWR)
        attacker.left("openpi")
    with _zmq(attacker) as client:
        client.send(bodies["gr00t"])
        time.sleep(0.01)
        attacker.left("gr00t")


def half_bodies(attacker: Attacker) -> None:
    """Say that nothing more comes, before all has come."""
    bodies = attacker.bodies()
    body = bodies["act"]
    with contextlib.suppress(OSError), attacker.address.connect() as peer:
        peer.sendall(_HEAD % len(body) + body[: attacker.rng.randrange(len(body))])
        attacker.left("act")
        if not attacker.address.encrypted:
            peer.shutdown(socket.SHUT_WR)
            _drain(peer)
    message = bodies["openpi"]
    frame = struct.pack("!BBQ", 0x82, 0x80 | 127, len(message)) + bytes(4)
    with contextlib.suppress(OSError), attacker.address.connect() as peer:
        peer.sendall(_UPGRADE + frame + message[: attacker.rng.randrange(len(message))])
        attacker.left("openpi")
        if not attacker.address.encrypted:
            peer.shutdown(socket.SHUT_WR)
            _drain(peer)
    with contextlib.suppress(OSError), _zmq_raw(attacker) as peer:
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
        peer.sendall(greeting + b"\x06" + (1 << 20).to_bytes(8, "big") + b"half")
        attacker.left("gr00t")
        time.sleep(0.01)


def mutated_requests(attacker: Attacker) -> None:
    """Send right requests with bytes flipped, cut, inserted and repeated."""
    for _ in range(_MUTATIONS):
        for protocol, body in attacker.bodies().items():
            send_body(attacker, protocol, mutated(body, attacker.rng))


def costly_requests(attacker: Attacker) -> None:
    """Send what would take memory and minutes: structure, pictures, words without end."""
    seen = observation_of(_ATTACKER, 0)
    words = {"instruction": "\N{GRINNING FACE}" * 4000}
    picture = {"__numpy__": "AA==", "dtype": "|u1", "shape": [1, 1 << 20, 3]}
    fields = json.loads(encode_request(seen, CONTRACT))
    for body in (
        json.dumps({**fields, **words}).encode(),
        json.dumps({**fields, "image": picture}).encode(),
        b'{"instruction":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"state":[' + b"{}," * 300_000 + b"{}]}",
    ):
        send_body(attacker, "act", body)
    for packed in (
        pack({"prompt": words["instruction"]}),
        b"\xdd\x00\x04\x00\x00" + b"\x90" * (1 << 18),
        b"\x91" * 100_000 + b"\x90",
        pack({"observation/image": bytes(1 << 20)}),
    ):
        send_body(attacker, "openpi", packed)
        send_body(attacker, "gr00t", packed)


ATTACKS: Mapping[str, Callable[[Attacker], None]] = {
    "slow peers": slow_peers,
    "disconnects": disconnects,
    "half bodies": half_bodies,
    "mutated requests": mutated_requests,
    "costly requests": costly_requests,
}


def mutated(body: bytes, rng: random.Random) -> bytes:
    """Return a body with some bytes changed."""
    changed = bytearray(body)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(changed) + 1)
        way = rng.randrange(4)
        if way == 0 and at < len(changed):
            changed[at] ^= rng.randrange(1, 256)
        elif way == 1:
            del changed[at : at + rng.randrange(1, 20)]
        elif way == 2:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            changed[at:at] = changed[at : at + 30]
    return bytes(changed)


def send_body(attacker: Attacker, protocol: ProtocolName, body: bytes) -> None:
    """Send the bytes of a request, right or wrong, and count what came back."""
    try:
        attacker.note(protocol, _SENDERS[protocol](attacker, body))
    except (OSError, HTTPException, WebSocketException, zmq.ZMQError) as error:
        tally = attacker.tallies[protocol]
        tally.sent += 1
        is_silent = isinstance(error, TimeoutError | zmq.Again)
        # Cut off is an answer; silence is none.
        if is_silent:
            tally.wrong["no reply to a mutated request"] += 1
        else:
            tally.refused["closed"] += 1


def _send_act(attacker: Attacker, body: bytes) -> str | None:
    http = HTTPConnection("127.0.0.1", attacker.address.port, timeout=_TIMEOUT_S)
    try:
        http.sock = attacker.address.connect(_TIMEOUT_S)
        http.request("POST", "/act", body, {"Host": "localhost"})
        reply = http.getresponse()
        content = reply.read()
    finally:
        http.close()
    if reply.status == 200:
        return None
    return f"{reply.status}: {content.decode(errors='replace')}"


def _send_openpi(attacker: Attacker, body: bytes) -> str | None:
    with _websocket(attacker) as client:
        client.send(body)
        reply = client.recv(timeout=_TIMEOUT_S)
    return None if isinstance(reply, bytes) else reply


def _send_gr00t(attacker: Attacker, body: bytes) -> str | None:
    with _zmq(attacker) as client:
        client.send(body)
        try:
            reply = unpack_message(client.recv(), REPLY_LIMITS)
        except QvlaError as error:
            return f"unreadable: {error}"
    return str(reply["error"]) if isinstance(reply, dict) and "error" in reply else None


_SENDERS: Mapping[ProtocolName, Callable[[Attacker, bytes], str | None]] = {
    "act": _send_act,
    "openpi": _send_openpi,
    "gr00t": _send_gr00t,
}


@contextlib.contextmanager
def _websocket(attacker: Attacker) -> Iterator[Any]:
    with connect(
        # Encrypted already, where it is.
        f"ws://127.0.0.1:{attacker.address.port}",
        sock=attacker.address.connect(_TIMEOUT_S),
        ssl=None,
        compression=None,
        max_size=None,
        proxy=None,
        ping_interval=None,
        open_timeout=_TIMEOUT_S,
        close_timeout=1,
    ) as client:
        client.recv(timeout=_TIMEOUT_S)
        yield client


@contextlib.contextmanager
def _zmq(attacker: Attacker) -> Iterator[Any]:
    context = zmq.Context()
    try:
        client = context.socket(zmq.REQ)
        client.setsockopt(zmq.LINGER, 0)
        client.setsockopt(zmq.RCVTIMEO, int(_TIMEOUT_S * 1000))
        client.connect(attacker.address.gr00t.url("tcp"))
        yield client
    finally:
        context.destroy(linger=0)


def _raw(attacker: Attacker) -> socket.socket:
    """Return a connection without a handshake, also where one is expected."""
    return socket.create_connection(("127.0.0.1", attacker.address.port), _TIMEOUT_S)


def _zmq_raw(attacker: Attacker) -> socket.socket:
    return socket.create_connection(("127.0.0.1", attacker.address.gr00t_port), _TIMEOUT_S)


def _drain(peer: socket.socket) -> None:
    peer.settimeout(_TIMEOUT_S)
    while peer.recv(1 << 16):
        pass

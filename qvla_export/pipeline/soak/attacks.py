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
from collections.abc import Callable, Mapping
from functools import partial

from websockets.exceptions import WebSocketException

from jetson.clients.protocol_clients import ProtocolName
from jetson.clients.websocket_clients import vla_eval_message
from jetson.serving.message_pack import pack
from jetson.serving.wire import encode_request
from qvla_export.pipeline.soak.attacker import (
    ATTACKER,
    WEBSOCKET_PATHS,
    Attacker,
    picture_file,
    raw_connection,
    read_to_end,
    send_body,
    websocket_connection,
    zmq_connection,
    zmq_raw_connection,
)
from qvla_export.pipeline.soak.numbered_policy import CAMERAS, CONTRACT, observation_of

_SLOW_PEERS = 24
_MUTATIONS = 20
_HEAD = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
_UPGRADE = (
    b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
# Of a picture file of one bit a pixel, kilobytes in all, that no camera takes.
_BOMB_SIDE = 9000


def slow_peers(attacker: Attacker) -> None:
    """Heads, bodies and frames that come a byte at a time, and handshakes that never end."""
    # Protocol, what connects, and what is sent first.
    beginnings: list[tuple[ProtocolName, Callable[[], socket.socket], bytes]] = [
        ("act", lambda: raw_connection(attacker), b""),
        ("act", attacker.address.connect, b"POST /act HT"),
        ("act", attacker.address.connect, _HEAD % 30_000_000 + b"{"),
        ("act", lambda: raw_connection(attacker), b"\x16\x03\x01\x02\x00\x01"),
        *(
            (name, partial(_upgraded, attacker, name), _frame_head(31 << 20))
            for name in WEBSOCKET_PATHS
        ),
    ]
    with contextlib.ExitStack() as stack:
        peers = []
        for number in range(_SLOW_PEERS):
            protocol, connect, beginning = beginnings[number % len(beginnings)]
            with contextlib.suppress(OSError):
                peer = stack.enter_context(connect())
                peer.sendall(beginning)
                peers.append(peer)
                attacker.left(protocol)
        zmq_peer = stack.enter_context(zmq_raw_connection(attacker))
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
    for name in WEBSOCKET_PATHS:
        with (
            contextlib.suppress(OSError, WebSocketException),
            websocket_connection(attacker, name) as client,
        ):
            client.send(bodies[name])
            client.socket.shutdown(socket.SHUT_RDWR)
            attacker.left(name)
    with zmq_connection(attacker) as client:
        client.send(bodies["gr00t"])
        time.sleep(0.01)
        attacker.left("gr00t")


def half_bodies(attacker: Attacker) -> None:
    """Say that nothing more comes, before all has come."""
    bodies = attacker.bodies()
    names: tuple[ProtocolName, ...] = ("act", *WEBSOCKET_PATHS)
    for name in names:
        body, is_http = bodies[name], name not in WEBSOCKET_PATHS
        head = _HEAD % len(body) if is_http else _frame_head(len(body))
        with (
            contextlib.suppress(OSError),
            attacker.address.connect() if is_http else _upgraded(attacker, name) as peer,
        ):
            peer.sendall(head + body[: attacker.rng.randrange(len(body))])
            attacker.left(name)
            if not attacker.address.encrypted:
                peer.shutdown(socket.SHUT_WR)
                read_to_end(peer)
    with contextlib.suppress(OSError), zmq_raw_connection(attacker) as peer:
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
    seen = observation_of(ATTACKER, 0)
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
        for name in (*WEBSOCKET_PATHS, "gr00t"):
            send_body(attacker, name, packed)
    pictures = dict.fromkeys(CAMERAS, picture_file(_BOMB_SIDE, "1"))
    bomb = {"images": pictures, "state": seen.state.tolist(), "task_description": "go"}
    send_body(attacker, "vla-eval", vla_eval_message("observation", bomb, 1))


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


def _upgraded(attacker: Attacker, protocol: ProtocolName) -> socket.socket:
    """Return a connection on which frames are next: those before the reply would not be read."""
    peer = attacker.address.connect()
    peer.sendall(_UPGRADE % WEBSOCKET_PATHS[protocol].encode())
    reply = b""
    while b"\r\n\r\n" not in reply:
        if not (received := peer.recv(1 << 12)):
            peer.close()
            raise ConnectionError("no websocket was opened")
        reply += received
    return peer


def _frame_head(size: int) -> bytes:
    """Return the head of a websocket frame that says how much comes, masked by zeros."""
    return struct.pack("!BBQ", 0x82, 0x80 | 127, size) + bytes(4)

"""The noun `Attacker`: whom it attacks, how it reaches every protocol, and what it was told."""

import contextlib
import io
import random
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any

import zmq
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from jetson.clients.protocol_clients import ProtocolName, gr00t_data
from jetson.clients.websocket_clients import (
    VLA_EVAL_PATH,
    openpi_request,
    vla_eval_message,
    vla_eval_payload,
)
from jetson.serving.message_pack import pack, unpack_map, unpack_message
from jetson.serving.structure import REPLY_LIMITS
from jetson.serving.wire import encode_request
from qvla_export.pipeline.soak.numbered_policy import CAMERAS, CONTRACT, observation_of
from qvla_export.pipeline.soak.server_process import Address
from qvla_export.pipeline.soak.tally import Tally
from qvla_export.shared.errors import QvlaError

ATTACKER = 63
# Protocol -> where its websocket is.
WEBSOCKET_PATHS: Mapping[ProtocolName, str] = {"openpi": "/", "vla-eval": VLA_EVAL_PATH}
_SIDE = 16
# Behind a message of vla-eval's, so that something comes back whatever it was mutated to.
_HELLO = vla_eval_message("hello", {}, 1 << 40)
TIMEOUT_S = 60.0


@dataclass
class Attacker:
    """Whom to attack, with what chance, and what came of it."""

    address: Address
    rng: random.Random
    tallies: dict[ProtocolName, Tally]

    def bodies(self) -> dict[ProtocolName, bytes]:
        """Return a right request of every protocol."""
        seen = observation_of(ATTACKER, self.rng.randrange(1000))
        payload = vla_eval_payload(seen)
        # Its clients compress pictures, so that a decoder is attacked too.
        payload["images"][CAMERAS[0]] = picture_file(_SIDE)
        return {
            "act": encode_request(seen, CONTRACT),
            "openpi": openpi_request(seen),
            "gr00t": pack({"endpoint": "get_action", "data": gr00t_data(seen)}),
            "vla-eval": vla_eval_message("observation", payload, 1),
        }

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
    http = HTTPConnection("127.0.0.1", attacker.address.port, timeout=TIMEOUT_S)
    try:
        http.sock = attacker.address.connect(TIMEOUT_S)
        http.request("POST", "/act", body, {"Host": "localhost"})
        reply = http.getresponse()
        content = reply.read()
    finally:
        http.close()
    if reply.status == 200:
        return None
    return f"{reply.status}: {content.decode(errors='replace')}"


def _send_openpi(attacker: Attacker, body: bytes) -> str | None:
    with websocket_connection(attacker, "openpi") as client:
        client.send(body)
        reply = client.recv(timeout=TIMEOUT_S)
    return None if isinstance(reply, bytes) else reply


def _send_gr00t(attacker: Attacker, body: bytes) -> str | None:
    with zmq_connection(attacker) as client:
        client.send(body)
        try:
            reply = unpack_message(client.recv(), REPLY_LIMITS)
        except QvlaError as error:
            return f"unreadable: {error}"
    return str(reply["error"]) if isinstance(reply, dict) and "error" in reply else None


def _send_vla_eval(attacker: Attacker, body: bytes) -> str | None:
    with websocket_connection(attacker, "vla-eval") as client:
        client.send(body)
        # Where the body closes the connection, what it was told is there already.
        with contextlib.suppress(WebSocketException):
            client.send(_HELLO)
        reply = unpack_map(client.recv(timeout=TIMEOUT_S), REPLY_LIMITS)
    kind, payload = reply["type"], reply["payload"]
    if kind == "action":
        return None
    return str(payload["error"]) if kind == "error" else "it was not asked for an action"


_SENDERS: Mapping[ProtocolName, Callable[[Attacker, bytes], str | None]] = {
    "act": _send_act,
    "openpi": _send_openpi,
    "gr00t": _send_gr00t,
    "vla-eval": _send_vla_eval,
}


@contextlib.contextmanager
def websocket_connection(attacker: Attacker, protocol: ProtocolName) -> Iterator[Any]:
    """Yield a websocket that has heard what its server says first."""
    with connect(
        # Encrypted already, where it is.
        f"ws://127.0.0.1:{attacker.address.port}{WEBSOCKET_PATHS[protocol]}",
        sock=attacker.address.connect(TIMEOUT_S),
        ssl=None,
        compression=None,
        max_size=None,
        proxy=None,
        ping_interval=None,
        open_timeout=TIMEOUT_S,
        close_timeout=1,
    ) as client:
        # vla-eval's clients speak first.
        if protocol == "openpi":
            client.recv(timeout=TIMEOUT_S)
        yield client


@contextlib.contextmanager
def zmq_connection(attacker: Attacker) -> Iterator[Any]:
    """Yield a socket as GR00T's clients have one."""
    context = zmq.Context()
    try:
        client = context.socket(zmq.REQ)
        client.setsockopt(zmq.LINGER, 0)
        client.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        client.connect(attacker.address.gr00t.url("tcp"))
        yield client
    finally:
        context.destroy(linger=0)


def raw_connection(attacker: Attacker) -> socket.socket:
    """Return a connection without a handshake, also where one is expected."""
    return socket.create_connection(("127.0.0.1", attacker.address.port), TIMEOUT_S)


def zmq_raw_connection(attacker: Attacker) -> socket.socket:
    """Return a connection to the ZMQ port that says nothing yet."""
    return socket.create_connection(("127.0.0.1", attacker.address.gr00t_port), TIMEOUT_S)


def picture_file(side: int, mode: str = "RGB") -> dict[str, Any]:
    """Return a black picture in one of Pillow's modes, a PNG file as vla-eval's clients send it."""
    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, "png")
    data, shape = file.getvalue(), [side, side, 3]
    return {"__image__": True, "format": "png", "data": data, "shape": shape}


def read_to_end(peer: socket.socket) -> None:
    """Read until the other side ends."""
    peer.settimeout(TIMEOUT_S)
    while peer.recv(1 << 16):
        pass

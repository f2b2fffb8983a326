"""Mutated requests in every protocol: a reason or an action, and never one from what was not sent.

Each valid request has fields dropped, renamed and replaced, arrays whose parts disagree, and bytes
flipped, cut and inserted. Whatever the policy then sees must be what upstream's own decoder reads
in the same bytes; everything else is refused with a reason, and the server stays well.
"""

import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from echo_policy import OFT, EchoPolicy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ports import free_port
from protocol_wires import IMAGE, WIRES, OpenpiWire, Wire

from jetson.server import open_server
from jetson.server_settings import ServerSettings
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation

MAX_BODY_BYTES = 1 << 16
EXAMPLES = [
    pytest.param(300, id="few"),
    pytest.param(20_000, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]

NUMBERS = st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(), st.booleans(), st.none())
JUNK = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=20), st.sampled_from(["|O", "<f8", "<U4", "fail", ""])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
SHAPES = st.lists(st.sampled_from([-1, 0, 1, 3, 4, 5, 60, 2**31, 2**62, 2**63]), max_size=10)
ARRAYS = st.sampled_from(
    [
        IMAGE[..., :2],
        IMAGE[None],
        IMAGE.astype(np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(7),
        np.full(8, np.nan),
        np.full(8, 1e300),
        np.zeros(8, np.int64),
        np.array(3.0),
    ]
)


class Recorder(EchoPolicy):
    """Keeps what it was asked; takes no time."""

    seen: Observation | None = None

    def infer(self, observation: Observation) -> ActionChunk:
        self.seen = observation
        actions = np.zeros((self.contract.horizon, self.contract.action_dim), np.float32)
        return ActionChunk(actions, actions)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Recorder, str, int]]:
    policy, port = Recorder(OFT), free_port()
    limits = {"max_body_bytes": MAX_BODY_BYTES, "max_rate_hz": 0.0}
    with open_server(policy, ServerSettings(port=0, gr00t_port=port, **limits)) as url:
        yield policy, url, port


def places(fields: dict[Any, Any]) -> list[tuple[dict[Any, Any], Any]]:
    """Return every (map, key) in nested maps, the parts of arrays among them."""
    found = []
    for key, value in fields.items():
        found.append((fields, key))
        if isinstance(value, dict):
            found += places(value)
    return found


def mutate_fields(data: st.DataObject, wire: Wire) -> dict[str, Any]:
    fields = wire.fields()
    for _ in range(data.draw(st.integers(0, 3))):
        found = places(fields)
        if not found:
            break
        owner, key = found[data.draw(st.integers(0, len(found) - 1))]
        how = data.draw(st.sampled_from(["drop", "rename", "junk", "shape", "array"]))
        value = owner.pop(key)
        if how == "rename":
            owner[data.draw(st.text(max_size=8))] = value
        elif how == "junk":
            owner[key] = data.draw(JUNK)
        elif how == "shape":
            owner[key] = [min(size, 2**63) for size in data.draw(SHAPES)]
        elif how == "array":
            owner[key] = wire.array(data.draw(ARRAYS))
    return fields


def mutate_bytes(data: st.DataObject, body: bytes) -> bytes:
    mutated = bytearray(body)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(mutated)))
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat", "grow"]))
        if how == "flip" and at < len(mutated):
            mutated[at] ^= data.draw(st.integers(1, 255))
        elif how == "cut":
            del mutated[at : at + data.draw(st.integers(1, 20))]
        elif how == "insert":
            mutated[at:at] = data.draw(st.binary(max_size=9))
        elif how == "repeat":
            mutated[at:at] = mutated[at : at + 30]
        elif data.draw(st.integers(0, 50)) == 0:
            mutated[at:at] = bytes(MAX_BODY_BYTES)
    # A ZMQ message of four times the limit is cut off without a reply.
    return bytes(mutated[: 3 * MAX_BODY_BYTES])


def same(left: Any, right: Any) -> bool:
    return isinstance(left, np.ndarray | list) and np.array_equal(np.asarray(left), right)


def check_seen(observation: Observation, found: list[Any]) -> None:
    """Check that the policy saw images, state and words that upstream reads in the same bytes."""
    for image in observation.images.values():
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert any(same(value, image) for value in found)
    numbers = [v for v in found if isinstance(v, np.ndarray | list) and len(np.shape(v)) == 1]
    with np.errstate(over="ignore"):
        states = [np.asarray(v).astype(np.float32) for v in numbers if np.asarray(v).size == 8]
    assert np.isfinite(observation.state).all()
    assert any(np.array_equal(state, observation.state) for state in states)
    assert observation.instruction in [value for value in found if isinstance(value, str)]


@pytest.mark.parametrize("count", EXAMPLES)
@pytest.mark.parametrize("name", WIRES)
def test_mutated_requests(served: tuple[Recorder, str, int], name: str, count: int) -> None:
    policy, url, port = served
    wire: Wire = WIRES[name](url, port)
    whole = wire.encode(wire.fields())
    actions = 0

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal actions
        body = wire.encode(mutate_fields(data, wire))
        if data.draw(st.booleans()):
            body = mutate_bytes(data, body)
        policy.seen = None
        reason = wire.send(body)
        assert (reason is None) == (policy.seen is not None)
        if policy.seen is not None:
            actions += 1
            check_seen(policy.seen, wire.upstream(body))

    try:
        run()
        assert wire.send(whole) is None and actions > 0
    finally:
        wire.close()


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
PING = bytes([0x89, 0x82, 0, 0, 0, 0]) + b"hi"


@pytest.mark.parametrize("count", EXAMPLES)
def test_mutated_frames(served: tuple[Recorder, str, int], count: int) -> None:
    """Bytes of the handshake and of frames: the connection ends and the server does not."""
    _, url, port = served
    wire = OpenpiWire(url, port)
    body = wire.encode(wire.fields())
    frame = bytes([0x82, 0xFE]) + len(body).to_bytes(2, "big") + bytes(4) + body
    address = (url.removeprefix("http://").split(":")[0], int(url.rsplit(":", 1)[1]))

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        head = HANDSHAKE if data.draw(st.integers(0, 3)) else mutate_bytes(data, HANDSHAKE)
        with socket.create_connection(address, timeout=20) as client:
            client.sendall(head)
            try:
                # Frames are read from the reply on; what came with the handshake is none.
                reply = b""
                while head == HANDSHAKE and b"\r\n\r\n" not in reply:
                    received = client.recv(1 << 12)
                    assert received, "a good handshake is answered"
                    reply += received
                client.sendall(mutate_bytes(data, PING + frame))
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):
                    pass
            except OSError as error:  # it was cut off while still speaking
                assert not isinstance(error, TimeoutError)

    try:
        run()
        assert wire.send(body) is None
    finally:
        wire.close()

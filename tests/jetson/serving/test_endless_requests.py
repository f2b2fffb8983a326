"""Requests without end, or with two: each piece is small, and there is a last one."""

import socket
from contextlib import ExitStack, suppress

import json_numpy
import pytest
import requests
from echo_policy import OFT, EchoPolicy, oft_fields
from ports import free_port
from rude_clients import place_of, websocket_client
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from zmtp_peer import peer

from jetson.server import open_server
from jetson.server_settings import ServerSettings


@pytest.mark.parametrize("payload", [b"", b"x"])
def test_a_chain_of_fragments_has_an_end(payload: bytes) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0)))
        client = websocket_client(url, stack)
        for index in range(64):
            opcode = Opcode.CONT if index else Opcode.BINARY
            frame = Frame(opcode, payload, fin=False)
            client.socket.sendall(frame.serialize(mask=True))
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
        assert "64 frames" in closed.value.rcvd.reason


def test_a_request_with_two_lengths_closes_the_connection() -> None:
    with (
        open_server(EchoPolicy(OFT), ServerSettings(port=0)) as url,
        socket.create_connection(place_of(url), timeout=20) as client,
    ):
        client.sendall(
            b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        reply = b""
        while part := client.recv(1 << 16):
            reply += part
        assert reply.startswith(b"HTTP/1.1 400") and reply.count(b"HTTP/1.1") == 1
        assert b"not both" in reply


def test_a_body_of_countless_chunks_is_none() -> None:
    head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    policy = EchoPolicy(OFT)
    body = json_numpy.dumps(oft_fields()).encode()
    with open_server(policy, ServerSettings(port=0)) as url:
        for size, status in ((1, b"400"), (16, b"200")):
            pieces = [body[i : i + size] for i in range(0, len(body), size)]
            assert (len(pieces) > 1024) == (status == b"400")
            with socket.create_connection(place_of(url), timeout=20) as client:
                chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
                with suppress(ConnectionResetError, BrokenPipeError):
                    client.sendall(head + chunks + b"0\r\n\r\n")
                assert client.recv(100).split()[1] == status


def test_what_breaks_after_the_reply_ends_quietly(caplog: pytest.LogCaptureFixture) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with open_server(EchoPolicy(OFT), ServerSettings(port=0)) as url:
        with socket.create_connection(place_of(url), timeout=20) as client:
            client.sendall(head)
            assert client.recv(1000).split()[1] == b"200"
            client.sendall(b"no chunk\r\n")
            with suppress(ConnectionResetError):
                # The reply's body may come in a packet of its own.
                assert client.recv(1000) in (b"", b"OK\n")
                assert client.recv(1000) == b""
        assert requests.get(f"{url}/healthz", timeout=20).status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_pings_without_end_are_requests_too() -> None:
    settings = ServerSettings(port=0, gr00t_port=free_port(), max_rate_hz=20.0)
    ping = bytes([0x89, 0x80]) + bytes(4)
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), settings))
        client = websocket_client(url, stack)
        with suppress(OSError):
            client.socket.sendall(ping * 2000)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        assert settings.gr00t_port is not None
        other = peer(settings.gr00t_port, stack)
        with suppress(OSError):
            other.sendall(b"\x04\x07\x04PING\0\0" * 2000)
        with suppress(ConnectionResetError):
            while other.recv(1 << 16):
                pass

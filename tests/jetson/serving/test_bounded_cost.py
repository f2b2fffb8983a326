"""What a request costs is bounded before it is paid: structure, pictures, words."""

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import json_numpy
import msgpack
import numpy as np
import pytest
from echo_policy import IMAGE, OFT, oft_fields
from hypothesis import given
from hypothesis import strategies as st

from jetson.errors import WireError
from jetson.serving import message_pack
from jetson.serving.arrays import decode_array, decode_npy, decode_packed
from jetson.serving.message_pack import text_field, unpack_map, unpack_message
from jetson.serving.protocols.gr00t_messages import decode_observation as gr00t_observation
from jetson.serving.protocols.openpi import decode_observation as openpi_observation
from jetson.serving.wire import decode_request
from qvla_export.shared.errors import InvalidObservation
from qvla_export.shared.json_documents import brief
from qvla_export.shared.picture_bounds import picture_fault

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=80)
    | st.binary(max_size=400)
)


def depth(value: Any) -> int:
    """How many containers are inside each other."""
    inside = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, inside), default=0) if isinstance(value, dict | list) else 0


VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=40,
).filter(lambda value: depth(value) <= 6)  # two more that tests put around it are the limit


@given(VALUES)
def test_what_msgpack_packs_is_walked_to_its_end_and_unpacked_equal(value: Any) -> None:
    assert unpack_message(msgpack.packb(value)) == value


@given(st.binary(max_size=300))
def test_whatever_bytes_come_they_are_a_message_or_refused(body: bytes) -> None:
    try:
        unpack_message(body)
        text_field(body, "api_token")
    except WireError as error:
        assert "must be msgpack" in str(error)


@given(
    st.dictionaries(st.text(max_size=12), VALUES, max_size=8),
    st.text(max_size=40),
    st.integers(0, 8),
)
def test_a_token_is_found_without_unpacking_the_rest(
    fields: dict[str, Any], token: str, place: int
) -> None:
    items = [item for item in fields.items() if item[0] != "api_token"]
    message = dict([*items[:place], ("api_token", token), *items[place:]])
    assert text_field(msgpack.packb(message), "api_token") == token
    assert text_field(msgpack.packb(dict(items)), "api_token") is None
    # One that is deeper down is not the client's own.
    assert text_field(msgpack.packb({"data": message}), "api_token") is None


@pytest.mark.parametrize(
    "body",
    [
        b"\xdc\xff\xff" + b"\x90" * 65535,
        b"\xdd\x01\x00\x00\x00" + b"\x80" * (1 << 24),
        b"\x91" * 1000 + b"\xc0",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        msgpack.packb([[0] * 600, [0] * 600]),
        msgpack.packb({"a": msgpack.ExtType(1, b"x")}),
        msgpack.packb({}) + b"\x00",
    ],
)
def test_structure_is_refused_before_objects_are_made(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(*_: object, **__: object) -> None:
        raise AssertionError("it was unpacked")

    monkeypatch.setattr(message_pack.msgpack, "unpackb", unpack)
    with pytest.raises(WireError):
        unpack_map(body)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"{}," * (8 << 20) + b"{}]",
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"a": [[[[[[[[[[1]]]]]]]]]]}',
        json.dumps({"encoded": "[" * 9000}).encode(),
        b'{"instruction": ' + b"7" * 5000 + b"}",
        b'{"instruction": "a", "instruction": "b"}',
    ],
)
def test_json_of_many_values_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="must be JSON"):
        decode_request(body, OFT)


@pytest.mark.parametrize(
    ("height", "width", "fault"),
    [
        (1, 8192, "1 to 8"),
        (9, 1, "1 to 8"),
        (8192, 8192, "16,777,216"),
        (8193, 2000, "sides of 8192"),
        (0, 5, "one pixel"),
        (2160, 3840, None),
        (1, 8, None),
    ],
)
def test_pictures_that_no_camera_takes(height: int, width: int, fault: str | None) -> None:
    found = picture_fault(width, height)
    assert (found is None) == (fault is None) and (fault or "") in (found or "")


def test_a_strip_is_refused_by_its_name() -> None:
    strip = np.zeros((1, 8192, 3), np.uint8)
    body = json_numpy.dumps(oft_fields(wrist_image=strip)).encode()
    with pytest.raises(InvalidObservation, match=r"wrist_image.*1 to 8"):
        decode_request(body, OFT)
    assert (
        decode_request(json_numpy.dumps(oft_fields()).encode(), OFT)
        .observation.images["hand"]
        .shape
        == IMAGE.shape
    )


LONG = 4 << 20


@pytest.mark.parametrize(
    "refused",
    [
        lambda: decode_npy(bytes(LONG), "image"),
        lambda: decode_npy(b"\x93NUMPY\1\0\xff\xff" + bytes(LONG), "image"),
        lambda: decode_packed({b"__ndarray__": True, b"dtype": bytes(LONG)}, "image"),
        lambda: decode_array({"__numpy__": "", "dtype": "\0" * LONG}, "image"),
        lambda: decode_array({"__numpy__": "", "dtype": "|u1", "shape": ["\0" * LONG]}, "image"),
        lambda: decode_request(b'{"encoded": 1, "%s": 2}' % (b"x" * LONG), OFT),
        lambda: decode_request(json_numpy.dumps(oft_fields(unnorm_key="x" * LONG)).encode(), OFT),
        lambda: decode_request(json_numpy.dumps(oft_fields(instruction=" " * LONG)).encode(), OFT),
        lambda: gr00t_observation({"data": {"observation": {"video": {}, "x" * LONG: 1}}}, OFT),
        lambda: gr00t_observation(
            {"data": {"observation": {"video": {}, "language": {"x" * LONG: 1, "y": 2}}}}, OFT
        ),
        lambda: openpi_observation(msgpack.packb({b"\0" * LONG: 1}), OFT),
        lambda: openpi_observation(
            msgpack.packb({"observation/" + "x" * LONG: 1, "x" * LONG: 2}), OFT
        ),
    ],
)
def test_a_reason_shows_a_line_of_what_was_sent(refused: Callable[[], object]) -> None:
    """Not the whole of it, written out first: 30 MB took half a second and 120 MB."""
    with pytest.raises((WireError, InvalidObservation)) as caught:
        refused()
    assert len(str(caught.value)) < 600


def test_what_is_shown_is_not_written_out_first() -> None:
    for value in (bytes(LONG), bytearray(LONG), "\0" * LONG, {"a": [bytes(LONG)]}):
        tracemalloc.start()
        text = brief(value)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(text) < 200 and peak_bytes < 100_000

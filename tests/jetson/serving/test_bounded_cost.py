"""What a request costs is bounded before it is paid: structure, pictures, words."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
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
from jetson.serving.structure import (
    ACT_LIMITS,
    GR00T_LIMITS,
    OPENPI_LIMITS,
    REPLY_LIMITS,
    VLA_EVAL_LIMITS,
    StructureLimits,
    require_bounded_json,
)
from jetson.serving.wire import decode_request
from qvla_export.shared.errors import InvalidObservation
from qvla_export.shared.json_documents import brief
from qvla_export.shared.pictures.picture_bounds import picture_fault

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
    assert unpack_message(msgpack.packb(value), REPLY_LIMITS) == value


@given(st.binary(max_size=300))
def test_whatever_bytes_come_they_are_a_message_or_refused(body: bytes) -> None:
    try:
        unpack_message(body, REPLY_LIMITS)
        text_field(body, "api_token", REPLY_LIMITS)
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
    for sent, found in (
        (message, token),
        (dict(items), None),
        # One that is deeper down is not the client's own.
        ({"data": message}, None),
    ):
        assert text_field(msgpack.packb(sent), "api_token", REPLY_LIMITS) == found


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
        unpack_map(body, REPLY_LIMITS)


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


def counts(value: Any, in_list: bool = False) -> tuple[int, int]:
    """How many values, and how many numbers in lists, a document has."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        found = [counts(one, isinstance(value, list)) for one in inside]
        return 1 + sum(values for values, _ in found), sum(numbers for _, numbers in found)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, 1) if in_list and is_number else (1, 0)


def walk_json(value: Any, limits: StructureLimits) -> None:
    require_bounded_json(json.dumps(value), limits)


def walk_msgpack(value: Any, limits: StructureLimits) -> None:
    unpack_message(msgpack.packb(value), limits)


DOCUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.sampled_from('"\\\\,:[]{} a\N{GRINNING FACE}'), max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


@pytest.mark.parametrize("walk", [walk_json, walk_msgpack])
@given(DOCUMENTS)
def test_every_value_is_counted_once(walk: Callable[..., None], value: Any) -> None:
    """In both formats: what is allowed passes, one less of anything is refused."""
    values, numbers = counts(value)
    limits = StructureLimits(depth(value), values, numbers)
    walk(value, limits)
    for name in ("depth", "values", "numbers"):
        if (most := getattr(limits, name)) > 0:
            with pytest.raises(ValueError, match="more than"):
                walk(value, replace(limits, **{name: most - 1}))


def array(*shape: int) -> dict[str, Any]:
    """As openpi's and vla-eval's clients nest one, without its numbers."""
    return {"__ndarray__": True, "data": b"", "dtype": "|u1", "shape": list(shape)}


CAMERAS, PIECES = [f"camera {i}" for i in range(4)], [f"piece {i}" for i in range(8)]
IMAGES = {name: array(480, 640, 3) for name in CAMERAS}
NPY = {"__ndarray_class__": True, "as_npy": b""}
OBSERVATION = {
    "video": dict.fromkeys(CAMERAS, NPY),
    "state": dict.fromkeys(PIECES, NPY),
    "language": {"annotation.human.task_description": [["pick it up"]]},
}


@pytest.mark.parametrize(
    ("limits", "request_", "most"),
    [
        (ACT_LIMITS, {**IMAGES, "state": [0.0] * 64, "instruction": "", "unnorm_key": ""}, 24),
        (OPENPI_LIMITS, {"images": IMAGES, "state": array(14), "prompt": ""}, 28),
        (OPENPI_LIMITS, {**IMAGES, "joints": array(7), "gripper": array(1), "prompt": ""}, 32),
        (
            VLA_EVAL_LIMITS,
            {
                "type": "observation",
                "seq": 1,
                "timestamp": 0.0,
                "payload": {"images": IMAGES, "states": array(8), "task_description": ""},
            },
            32,
        ),
        (
            GR00T_LIMITS,
            {
                "endpoint": "get_action",
                "api_token": "0",
                "data": {"observation": OBSERVATION, "options": None},
            },
            48,
        ),
    ],
)
def test_clients_of_four_cameras_have_room(
    limits: StructureLimits, request_: Any, most: int
) -> None:
    """A quarter of it at least; of GR00T's a humanoid, whose state comes in eight pieces."""
    values, _ = counts(request_)
    assert values <= most <= 0.75 * limits.values == 48
    walk_msgpack(request_, limits)
    assert depth(request_) <= limits.depth <= 6


@pytest.mark.parametrize(
    "text",
    [
        "[" + "1," * 2000 + "1]",
        '{"a":"' + '\\"' * 20_000 + '"}',
        ",:" * 9000,
        "7" * 60_000,
        '{"a":' + "x" * 5_000_000 + "}",
        '"' * 20_001,
    ],
)
def test_no_text_keeps_the_walk_busy(text: str) -> None:
    with pytest.raises(ValueError, match="more than"):
        require_bounded_json(text, ACT_LIMITS)


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

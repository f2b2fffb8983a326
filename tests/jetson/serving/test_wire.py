"""Bodies of `POST /act`: the published json_numpy package, and hostile input."""

import base64
import json
from typing import Any

import json_numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson.errors import RefusedSetting, WireError
from jetson.serving.arrays import decode_array, encode_array
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.wire import decode_reply, decode_request, encode_reply, encode_request
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import InvalidObservation, QvlaError
from qvla_export.shared.observation import Observation

ONE = PolicyContract(("image",), 4, 7, 0, "tiny")
TWO = PolicyContract(("front", "hand"), 4, 7, 8, "tiny")
THREE = PolicyContract(("top", "left_wrist", "right"), 25, 14, 14, "aloha")
ALOHA = PolicyContract(("full_image", "left_wrist_image", "right_wrist_image"), 25, 14, 0, "aloha")
IMAGE = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
CHUNK = ActionChunk(np.arange(28, dtype=np.float32).reshape(4, 7), np.zeros((4, 7), np.float32), {})


def body(**fields: Any) -> bytes:
    return str(json_numpy.dumps(fields)).encode()


def oft(**changes: Any) -> bytes:
    fields = {
        "full_image": IMAGE,
        "wrist_image": IMAGE + 1,
        "state": np.linspace(0, 1, 8),
        "instruction": "push",
    }
    return body(**{k: v for k, v in {**fields, **changes}.items() if v is not None})


@pytest.mark.parametrize("dtype", ["|b1", "|u1", "|i1", "<u2", ">i4", "<i8", "<f2", ">f4", "<f8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_arrays_round_trip_with_json_numpy(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    decoded = decode_array(json.loads(json_numpy.dumps(array)), "a")
    np.testing.assert_array_equal(decoded, array)
    assert decoded.shape == shape and decoded.dtype == array.dtype
    if array.size:
        np.testing.assert_array_equal(json_numpy.loads(json.dumps(encode_array(array))), array)


def test_a_non_contiguous_array_is_sent_as_it_looks() -> None:
    view = IMAGE[::-1, ::2]
    np.testing.assert_array_equal(
        decode_array(json.loads(json.dumps(encode_array(view))), "a"), view
    )


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"shape": [2, 2]}, "4 bytes"),
        ({"shape": [-1, -3]}, "sizes"),
        ({"shape": [2**31, 2**31, 3]}, "sizes"),
        ({"shape": [2**30, 2**30, 3]}, "sizes"),
        ({"shape": [0, 2**30, 2**30, 2**30, 2**30]}, "sizes"),
        ({"shape": [1] * 40}, "at most 8"),
        ({"shape": [True, 3]}, "sizes"),
        ({"shape": [3.0]}, "sizes"),
        ({"shape": "3"}, "sizes"),
        ({"shape": None}, "sizes"),
        ({"dtype": "|O"}, "plain number"),
        ({"dtype": "<c16"}, "plain number"),
        ({"dtype": "<M8[ns]"}, "plain number"),
        ({"dtype": "|V3"}, "plain number"),
        ({"dtype": "<f16"}, "plain number"),
        ({"dtype": [["a", "<f4"]]}, "plain number"),
        ({"dtype": None}, "plain number"),
        ({"dtype": "|u1\n"}, "plain number"),
        ({"__numpy__": "AA!D"}, "base64"),
        ({"__numpy__": "AA=="}, "bytes"),
        ({"__numpy__": "A==="}, "base64"),
        ({"__numpy__": "ÄÖÜß"}, "base64"),
        ({"__numpy__": 7}, "int"),
    ],
)
def test_hostile_arrays_are_refused(change: dict[str, Any], rule: str) -> None:
    honest = {"__numpy__": base64.b64encode(b"abc").decode(), "dtype": "|u1", "shape": [3]}
    with pytest.raises(WireError, match=rule):
        decode_array({**honest, **change}, "image")


def test_openvla_body_gets_the_first_action_as_float64() -> None:
    request = decode_request(body(image=IMAGE, instruction="push"), ONE)
    np.testing.assert_array_equal(request.observation.images["image"], IMAGE)
    action = json_numpy.loads(encode_reply(CHUNK, request))
    assert action.dtype == np.float64
    np.testing.assert_array_equal(action, CHUNK.actions[0])


def test_oft_body_gets_the_chunk_as_a_list_of_arrays() -> None:
    request = decode_request(oft(), TWO)
    np.testing.assert_array_equal(request.observation.images["hand"], IMAGE + 1)
    assert list(request.observation.images) == ["front", "hand"]
    assert request.observation.state.dtype == np.float32
    actions = json_numpy.loads(encode_reply(CHUNK, request))
    assert isinstance(actions, list) and actions[0].dtype == np.float64
    np.testing.assert_array_equal(np.stack(actions), CHUNK.actions)


@pytest.mark.parametrize("contract", [ONE, TWO])
def test_encoded_bodies_get_encoded_replies(contract: PolicyContract) -> None:
    plain = oft() if contract is TWO else body(image=IMAGE, instruction="push")
    request = decode_request(json.dumps({"encoded": plain.decode()}).encode(), contract)
    text = json.loads(encode_reply(CHUNK, request))
    assert isinstance(text, str)
    expected = CHUNK.actions if contract is TWO else CHUNK.actions[0]
    np.testing.assert_array_equal(json_numpy.loads(text), expected)


@pytest.mark.parametrize(
    ("fields", "contract", "sources"),
    [
        (["full_image"], ONE, {"image": "full_image"}),
        # Trained on one camera: upstream does not look at the wrist.
        (["full_image", "wrist_image"], ONE, {"image": "full_image"}),
        (["hand", "front"], TWO, {"front": "front", "hand": "hand"}),
        (["front", "wrist_image"], TWO, {"front": "front", "hand": "wrist_image"}),
        (["full_image", "hand"], TWO, {"front": "full_image", "hand": "hand"}),
        (
            ["wrist_image_2", "full_image", "wrist_image_1"],
            PolicyContract(("a", "b", "c"), 1, 7, 0, "k"),
            {"a": "full_image", "b": "wrist_image_2", "c": "wrist_image_1"},
        ),
        # Left and right by name, whichever is sent first.
        (
            ["full_image", "cam_right_wrist", "cam_left_wrist"],
            ALOHA,
            {
                "full_image": "full_image",
                "left_wrist_image": "cam_left_wrist",
                "right_wrist_image": "cam_right_wrist",
            },
        ),
        (
            ["full_image", "wristR", "left_wrist_image"],
            ALOHA,
            {
                "full_image": "full_image",
                "left_wrist_image": "left_wrist_image",
                "right_wrist_image": "wristR",
            },
        ),
        (
            ["full_image", "cam_right_wrist"],
            TWO,
            {"front": "full_image", "hand": "cam_right_wrist"},
        ),
        # An exact name wins over the order of wrist fields.
        (
            ["full_image", "right_wrist_image", "left_wrist"],
            THREE,
            {"top": "full_image", "left_wrist": "left_wrist", "right": "right_wrist_image"},
        ),
    ],
)
def test_fields_find_their_cameras(
    fields: list[str], contract: PolicyContract, sources: dict[str, str]
) -> None:
    images = {name: IMAGE + index for index, name in enumerate(fields)}
    state = {"state": np.zeros(contract.state_dim)} if contract.state_dim else {}
    request = decode_request(body(**images, **state, instruction="push"), contract)
    for camera, name in sources.items():
        np.testing.assert_array_equal(request.observation.images[camera], images[name])
    assert set(request.observation.images) == set(sources)
    assert request.reply == "chunk"


@pytest.mark.parametrize(
    ("cameras", "fields"),
    [
        (ALOHA.cameras, ["wrist_1", "wrist_2"]),
        (ALOHA.cameras, ["left_wrist_image", "other_left_wrist"]),
        (("a", "b", "c"), ["right_wrist_image", "left_wrist_image"]),
        (("a", "left_wrist"), ["right_wrist_image"]),
    ],
)
def test_the_order_never_decides_between_left_and_right(
    cameras: tuple[str, ...], fields: list[str]
) -> None:
    images = dict.fromkeys(("full_image", *fields), IMAGE)
    contract = PolicyContract(cameras, 1, 7, 0, "k")
    with pytest.raises(InvalidObservation, match="which is which"):
        decode_request(body(**images, instruction="push"), contract)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"full_image": None}, "missing"),
        ({"wrist_image": None}, "missing"),
        ({"front": IMAGE}, "send one of them"),
        ({"image": IMAGE}, "send one of them"),
        ({"left_wrist_image": IMAGE}, "more wrist images"),
        ({"full_image": IMAGE.astype(np.float32)}, "uint8"),
        ({"full_image": IMAGE[..., :2]}, "h, w, 3"),
        ({"full_image": IMAGE[None]}, "h, w, 3"),
        ({"full_image": IMAGE[:0]}, "one pixel"),
        ({"full_image": np.zeros((9000, 1, 3), np.uint8)}, "8192"),
        ({"full_image": IMAGE.tolist()}, "patch"),
        ({"state": None}, "state"),
        ({"state": np.zeros(7)}, "8 numbers"),
        ({"state": np.zeros((1, 8))}, "vector"),
        ({"state": np.array(["a"] * 8, "S1").view(np.uint8).astype(bool)}, "numbers"),
        ({"state": np.full(8, np.nan)}, "finite"),
        ({"state": np.full(8, 1e300)}, "finite"),
        ({"state": [0.0] * 7 + [float("nan")]}, "finite"),
        ({"state": [10**400] * 8}, "finite"),
        ({"state": ["0"] * 8}, "json-numpy"),
        ({"instruction": None}, "instruction"),
        ({"instruction": " "}, "instruction"),
        ({"instruction": 7}, "instruction"),
        ({"instruction": "x" * 3000}, "2000"),
        ({"instruction": "\ud800"}, "text"),
        ({"unnorm_key": "bridge"}, "available: .'tiny'"),
        ({"unnorm_key": 7}, "available"),
    ],
)
def test_requests_that_do_not_fit_are_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises((InvalidObservation, WireError), match=rule):
        decode_request(oft(**changes), TWO)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b'"error"',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"1" * 10_000,
        b'{"encoded": "{"}',
        b'{"encoded": 7}',
        b'{"encoded": "{}", "image": 1}',
        b'{"encoded": "' + b"[" * 50_000 + b'"}',
    ],
)
def test_malformed_json_is_a_wire_error(content: bytes) -> None:
    with pytest.raises(WireError):
        decode_request(content, ONE)


def test_a_plain_list_of_numbers_is_a_state_and_the_right_key_is_accepted() -> None:
    request = decode_request(oft(state=[0, 1.5, *[0] * 6], unnorm_key="tiny"), TWO)
    assert request.observation.state[1] == 1.5


def test_the_reply_form_can_be_chosen() -> None:
    request = decode_request(body(image=IMAGE, instruction="push"), ONE, reply="full")
    chunk = decode_reply(encode_reply(CHUNK, request))
    np.testing.assert_array_equal(chunk.actions, CHUNK.actions)
    np.testing.assert_array_equal(chunk.normalized, CHUNK.normalized)
    with pytest.raises(WireError, match="actions"):
        decode_reply(encode_reply(CHUNK, decode_request(oft(), TWO, reply="action")))


def test_our_requests_are_readable_by_us_and_by_json_numpy() -> None:
    observation = Observation({"hand": IMAGE, "front": IMAGE + 1}, "push", np.arange(8))
    content = encode_request(observation, TWO)
    again = decode_request(content, TWO).observation
    np.testing.assert_array_equal(again.images["hand"], IMAGE)
    np.testing.assert_array_equal(json_numpy.loads(content)["front"], IMAGE + 1)
    with pytest.raises(InvalidObservation, match="missing"):
        encode_request(Observation({"hand": IMAGE}, "push", np.arange(8)), TWO)


@pytest.mark.parametrize("cameras", [(), ("a", "a"), ("state",), ("a", "encoded")])
def test_camera_names_must_be_distinct_and_free(cameras: tuple[str, ...]) -> None:
    with pytest.raises(RefusedSetting, match="camera"):
        PolicyContract(cameras, 1, 7, 0, "k")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
_ARRAY = st.fixed_dictionaries(
    {},
    optional={
        "__numpy__": st.binary(max_size=40).map(lambda b: base64.b64encode(b).decode()) | _JSON,
        "dtype": st.sampled_from(["|u1", "<f4", "<f8", "|O", "|S3", "<U2", "<c8", "|b1"]) | _JSON,
        "shape": st.lists(st.integers(-3, 40), max_size=4) | _JSON,
    },
)
_FIELDS = st.dictionaries(
    st.sampled_from(
        ["image", "full_image", "wrist_image", "front", "hand", "state", "instruction",
         "unnorm_key", "encoded", "left_wrist_image"]
    ),
    _ARRAY | _JSON,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(_FIELDS, st.sampled_from([ONE, TWO, THREE]), st.booleans())
def test_fuzzed_fields_give_an_observation_or_a_reason(
    fields: dict[str, Any], contract: PolicyContract, nested: bool
) -> None:
    content = json.dumps(fields)
    content = json.dumps({"encoded": content}) if nested else content
    try:
        request = decode_request(content.encode(), contract)
    except QvlaError as error:
        assert str(error)
    else:
        contract.check(request.observation)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_bytes_give_an_observation_or_a_reason(data: st.DataObject) -> None:
    content = bytearray(oft())
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(st.integers(0, len(content) - 1))
        content[where : where + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        request = decode_request(bytes(content), TWO)
    except QvlaError as error:
        assert str(error)
    else:
        TWO.check(request.observation)
        assert np.isfinite(request.observation.state).all()

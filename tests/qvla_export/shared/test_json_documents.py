"""JSON of unknown origin: bounds that hold, and errors that say where."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import (
    FOREIGN,
    JsonLimits,
    Node,
    is_file_name,
    parse_document,
    read_bounded,
    read_json,
    read_lines,
    whole_number,
)

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(_VALUES)
def test_what_python_writes_is_read(value: Any) -> None:
    text = json.dumps(value)
    assert json.dumps(parse_document(text, "x", FOREIGN)) == text
    assert json.dumps(parse_document(b"\xef\xbb\xbf" + text.encode(), "x", FOREIGN)) == text


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        parse_document(data, "x")
    except ArtifactError as error:
        assert str(error).startswith("x: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 70 + "]" * 70, "nested more than 64 deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64 deep"),
        ("9" * 65, "a number of 65 digits, at most 64 are read"),
        ("[NaN]", "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        ('{"a": 1, "b": 2, "a": 3}', "the field 'a' is there twice"),
        ('{"a": 1', "Expecting"),
        (b"\xff{}", "utf-8"),
        ("[" + "0," * 1000 + "0]", "more than 1,000 values"),
    ],
)
def test_beyond_the_limits_is_refused(text: str | bytes, message: str) -> None:
    limits = JsonLimits(values=1000) if "0,0" in str(text) else JsonLimits()
    with pytest.raises(ArtifactError, match=f"^the letter is wrong: .*{message}"):
        parse_document(text, "the letter is wrong", limits)


def test_files_are_bounded_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ArtifactError, match=f"letter not found: {path}"):
        read_json(path, "letter")
    with pytest.raises(ArtifactError, match=f"letter cannot be read: {tmp_path}: Is a dir"):
        read_json(tmp_path, "letter")
    path.write_text('{"a": [1, 2.5]}')
    assert read_json(path, "letter") == {"a": [1, 2.5]}
    assert read_bounded(path, "letter", 15) == path.read_bytes()
    with pytest.raises(ArtifactError, match=r"letter is too large: .* more than 14 bytes"):
        read_bounded(path, "letter", 14)


def test_lines_are_numbered_as_editors_do(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "\u2028"}\n\n{"a": 2}\r\n')
    assert list(read_lines(path, "letters")) == [(1, {"a": "\u2028"}), (3, {"a": 2})]
    path.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ArtifactError, match=f"{path}, line 2 holds no JSON object"):
        list(read_lines(path, "letters"))


def test_nodes_say_where_and_what() -> None:
    node = Node({"a": {"b": [1, None, "x"]}, "n": 3.0, "s": ["long" * 500]}, "f.json")
    assert node.field("n").whole() == 3
    assert node.field("a").has("b") and not node.has("missing") and not node.field("n").has("x")
    assert [n.path for n in node.field("a").field("b").elements()] == ["a.b[0]", "a.b[1]", "a.b[2]"]
    for read, message in (
        (lambda: node.field("a").field("b").elements()[1].whole(), r"f.json, a.b\[1\]: a whole"),
        (lambda: node.field("a").field("b").numbers(), r"f.json, a.b: a list of finite numbers"),
        (lambda: node.field("a").field("c").text(), "f.json, a.c: a text of .*, got nothing; mend"),
        (lambda: node.field("n").field("c"), "f.json, n: an object with 'c' is needed, got 3.0"),
        (lambda: node.field("n").elements(), "f.json, n: a list is needed"),
        (lambda: node.field("s").fields(), "f.json, s: an object is needed"),
        (lambda: node.field("a").number(), "f.json, a: a finite number"),
        (lambda: node.field("n").text(), "f.json, n: a text"),
        (lambda: node.field("s").elements()[0].text(10), r"s\[0\]: a text of at most 10 char"),
        (lambda: node.field("n").whole(4, 7), "a whole number from 4 to 7 is needed, got 3.0"),
    ):
        with pytest.raises(ArtifactError, match=message) as caught:
            read()
        assert len(str(caught.value)) < 200


def test_null_may_be_not_a_number() -> None:
    values = Node([1, None, math.inf], "f").numbers(non_finite=True)
    assert values[0] == 1 and math.isnan(values[1]) and values[2] == math.inf
    with pytest.raises(ArtifactError, match="a list of numbers is needed"):
        Node(["1"], "f").numbers(non_finite=True)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1, 0.5, "1", True, [1], 2**63, 1e300])
def test_no_whole_number(value: object) -> None:
    with pytest.raises(ArtifactError, match=r"^here: a whole number from 0 on is needed, got"):
        whole_number(value, "here")


@given(st.integers(0, 2**53))
def test_whole_numbers_may_be_floats(value: int) -> None:
    assert whole_number(value, "") == whole_number(float(value), "") == value


def test_names_of_files_lead_nowhere_else_and_fit_a_file_system() -> None:
    assert is_file_name("model-00001.safetensors") and is_file_name("x" * 255)
    for text in ("", ".", "..", "a/b", "/a", "a\0b", "x" * 256, "\N{GRINNING FACE}" * 64):
        assert not is_file_name(text), text


def test_a_number_above_0_is_above_0() -> None:
    assert Node(0.5, "f.json").positive() == 0.5
    for value in (0, -1, "1", None, True, float("nan"), float("inf")):
        with pytest.raises(ArtifactError, match="number"):
            Node(value, "f.json").positive()

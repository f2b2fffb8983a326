"""JSON of unknown origin: read within bounds, and taken apart with errors that say where.

Everything read as JSON comes through here: data sets' metadata, checkpoints, statistics, bundles,
messages of recordings. Standard library only.
"""

import json
import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.git_lfs import refuse_pointer

_REPAIR = "mend the file, or get it anew"
_MISSING = object()
# Of a file's name, on every file system of robots and hosts.
_MOST_NAME_BYTES = 255


@dataclass(frozen=True)
class JsonLimits:
    """How much a document may hold; what is beyond is refused before it costs memory or time."""

    # Of the file, or of the text.
    size_bytes: int = 256 << 20
    # Values and names in it, counted before they are made; a tokenizer of 262,144 words has 2e6.
    values: int = 16_000_000
    # Lists and objects inside each other.
    depth: int = 64
    # Digits of a whole number; `model_max_length` of transformers has 31.
    digits: int = 64
    # Whether NaN and Infinity, which JSON has not, are read as Python writes them.
    non_finite: bool = False


LIMITS = JsonLimits()
# What others write: statistics have NaN where they do not hold.
FOREIGN = replace(LIMITS, non_finite=True)


def read_bounded(path: Path, what: str, most_bytes: int) -> bytes:
    """Return a file's bytes.

    Args:
        path: the file.
        what: it in words, for messages.
        most_bytes: it may have.

    Raises:
        ArtifactError: it is missing, no file, unreadable or larger, or a pointer of Git LFS.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise ArtifactError(f"{what} not found: {path}") from None
    except OSError as error:
        raise ArtifactError(f"{what} cannot be read: {path}: {error.strerror}") from None
    refuse_pointer(path, data)
    if len(data) > most_bytes:
        raise ArtifactError(f"{what} is too large: {path} has more than {most_bytes:,} bytes")
    return data


def read_json(path: Path, what: str, limits: JsonLimits = LIMITS) -> Any:
    """Return the value of a JSON file.

    Raises:
        ArtifactError: it is missing, is not JSON or goes beyond the limits.
    """
    return parse_document(
        read_bounded(path, what, limits.size_bytes), f"{what} is not valid JSON: {path}", limits
    )


def read_lines(
    path: Path, what: str, limits: JsonLimits = LIMITS
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number, from 1, and object of each line that is not empty.

    Raises:
        ArtifactError: the file is missing, or a line is no JSON object or beyond the limits, which
            hold for the file's size and for each line.
    """
    data = read_bounded(path, what, limits.size_bytes)
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        row = parse_document(line, f"{path}, line {number} is not valid JSON", limits)
        if not isinstance(row, dict):
            raise ArtifactError(f"{path}, line {number} holds no JSON object")
        yield number, row


def parse_document(data: bytes | str, wrong: str, limits: JsonLimits = LIMITS) -> Any:
    """Return the value of a JSON text, UTF-8 where it is bytes.

    Args:
        data: the text.
        wrong: begins the message of an error, "the header of FILE is not valid JSON".
        limits: how much it may hold.

    Raises:
        ArtifactError: it is not JSON, names a field twice or goes beyond the limits.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        # What stands in texts is counted too, so there are never more than that.
        count = sum(text.count(mark) for mark in ",:[{")
        if len(text) > limits.size_bytes or count > limits.values:
            raise ValueError(f"more than {limits.values:,} values or {limits.size_bytes:,} bytes")
        value = _decoder(limits).decode(text)
        _require_shallow(value, limits.depth)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError(f"{wrong}: {reason[:300]}") from None
    return value


def object_or_empty(data: bytes | str, limits: JsonLimits = LIMITS) -> dict[str, Any]:
    """Return the object of a JSON text; an empty one where it holds none, or is beyond the limits.

    For what may be anything: a line of a program, a file that is refused for another reason.
    """
    try:
        value = parse_document(data, "", limits)
    except ArtifactError:
        return {}
    return value if isinstance(value, dict) else {}


def _decoder(limits: JsonLimits) -> json.JSONDecoder:
    def whole(text: str) -> int:
        if len(text) > limits.digits:
            raise ValueError(f"a number of {len(text)} digits, at most {limits.digits} are read")
        return int(text)

    def constant(text: str) -> float:
        if not limits.non_finite:
            raise ValueError(f"{text} is no JSON number; write null or a finite one")
        return float(text)

    # A decoder of our own: a process that called json_numpy.patch() has replaced json.loads.
    return json.JSONDecoder(
        parse_int=whole, parse_constant=constant, object_pairs_hook=_object_of_pairs
    )


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in value if names.count(name) > 1)
        raise ValueError(f"the field {twice[:80]!r} is there twice")
    return value


def _require_shallow(value: Any, most: int) -> None:
    level = [value]
    for _ in range(most + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(v for v in one.values() if isinstance(v, dict | list))
            elif isinstance(one, list):
                inner.extend(v for v in one if isinstance(v, dict | list))
        if not inner:
            return
        level = inner
    raise ValueError(f"nested more than {most} deep")


@dataclass(frozen=True)
class Node:
    """A value of a document and where it stands; each way of reading it says what is wrong.

    Raises:
        ArtifactError: from all methods; it names file, place, rule, value and remedy.
    """

    value: Any
    # The file, as messages name it.
    file: str
    # What leads to the value: `features.action.shape[0]`.
    path: str = ""
    remedy: str = _REPAIR

    @property
    def place(self) -> str:
        """File and path, as messages begin."""
        return f"{self.file}, {self.path}" if self.path else self.file

    def wrong(self, rule: str) -> ArtifactError:
        """Return the error that a rule is broken here."""
        got = "nothing" if self.value is _MISSING else brief(self.value)
        return ArtifactError(f"{self.place}: {rule}, got {got}; {self.remedy}")

    def fields(self) -> dict[str, "Node"]:
        """Return an object's fields by name."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object is needed")
        return {name: self._inner(f".{name}", value) for name, value in self.value.items()}

    def field(self, name: str) -> "Node":
        """Return one field; reading what is missing says so."""
        if not isinstance(self.value, dict):
            raise self.wrong(f"an object with {name!r} is needed")
        return self._inner(f".{name}", self.value.get(name, _MISSING))

    def has(self, name: str) -> bool:
        """Whether this is an object with a field that is not null."""
        return isinstance(self.value, dict) and self.value.get(name) is not None

    def elements(self) -> list["Node"]:
        """Return a list's elements."""
        if not isinstance(self.value, list):
            raise self.wrong("a list is needed")
        return [self._inner(f"[{i}]", value) for i, value in enumerate(self.value)]

    def text(self, most: int = 1 << 20) -> str:
        """Return a text of at most so many characters."""
        if not isinstance(self.value, str) or len(self.value) > most:
            raise self.wrong(f"a text of at most {most:,} characters is needed")
        return self.value

    def whole(self, low: int = 0, high: int = 2**63 - 1) -> int:
        """Return a whole number, also where it is stored as a float."""
        if not _is_whole(self.value) or not low <= self.value <= high:
            upper = "on" if high == 2**63 - 1 else f"to {high}"
            raise self.wrong(f"a whole number from {low} {upper} is needed")
        return int(self.value)

    def number(self) -> float:
        """Return a finite number."""
        if not _is_number(self.value) or not math.isfinite(_float(self.value)):
            raise self.wrong("a finite number is needed")
        return _float(self.value)

    def positive(self) -> float:
        """Return a finite number above 0."""
        if not self.number() > 0:
            raise self.wrong("a number above 0 is needed")
        return self.number()

    def numbers(self, non_finite: bool = False) -> list[float]:
        """Return a list of numbers.

        Args:
            non_finite: whether NaN and infinity are taken too, and null as NaN.
        """
        values = self.value if isinstance(self.value, list) else [_MISSING]
        if non_finite:
            values = [math.nan if value is None else value for value in values]
        if not all(_is_number(v) and (non_finite or math.isfinite(_float(v))) for v in values):
            raise self.wrong(f"a list of {'' if non_finite else 'finite '}numbers is needed")
        return [_float(value) for value in values]

    def _inner(self, step: str, value: Any) -> "Node":
        path = (self.path + step).removeprefix(".")
        return Node(value, self.file, path, self.remedy)


def whole_number(value: Any, place: str) -> int:
    """Return a whole number, also where it is stored as a float.

    Raises:
        ArtifactError: it is null, NaN, negative or no number; `place` says where.
    """
    return Node(value, place, remedy="write the dataset's metadata anew").whole()


def is_file_name(text: str) -> bool:
    """Whether a text is the name of a file in a folder: no way out, none that is too long."""
    size = len(text.encode(errors="replace"))
    return Path(text).name == text != ".." and "\0" not in text and 0 < size <= _MOST_NAME_BYTES


# Of a value in a message: levels and elements are bounded one by one, and many may be there.
_MOST_SHOWN = 200


def brief(value: Any) -> str:
    """Return a value as messages show it, never longer than a line.

    Of what is long only the ends are looked at: `repr` of 30 MB takes half a second.
    """
    text = _BRIEF.repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


class _Brief(reprlib.Repr):
    def repr_bytes(self, value: bytes | bytearray, level: int) -> str:
        """Return bytes as `reprlib` returns a text."""
        return repr(bytes(value[: self.maxstring])) + self.fillvalue * (len(value) > self.maxstring)

    repr_bytearray = repr_bytes


_BRIEF = _Brief()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and math.isfinite(_float(value)) and value == int(value)


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf

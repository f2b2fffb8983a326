"""`tf.train.Example` and `SequenceExample` messages, read from protobuf's wire format.

Source: tensorflow/core/example/{example,feature}.proto and protobuf's encoding guide.

    Example {Features features = 1}                Features {map<string, Feature> feature = 1}
    SequenceExample {Features context = 1; FeatureLists feature_lists = 2}
    FeatureLists {map<string, FeatureList> = 1}    FeatureList {repeated Feature feature = 1}
    Feature {BytesList = 1 | FloatList = 2 | Int64List = 3}, each {repeated value = 1}
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Bytes of a varint of 64 bits.
_LONGEST_VARINT = 10
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# What a feature holds: byte strings, float32 [n] or int64 [n].
Values = list[memoryview] | NDArray[np.float32] | NDArray[np.int64]


def example_features(record: memoryview) -> dict[str, list[memoryview]]:
    """Return name -> `Feature` messages, unread: one of an Example, several of a feature list.

    Raises:
        ValueError: the bytes are no such message.
    """
    features: dict[str, list[memoryview]] = {}
    for number, value in _messages(record):
        if number == 1:
            for name, feature in _map_entries(value):
                features[name] = [feature]
        elif number == 2:
            for name, entries in _map_entries(value):
                features[name] = [feature for n, feature in _messages(entries) if n == 1]
    return features


def feature_values(feature: memoryview) -> Values:
    """Return a feature's values.

    Raises:
        ValueError: the bytes are no such message.
    """
    values: Values = []
    for number, value in _messages(feature):
        if number == 1:
            values = [one for n, one in _messages(value) if n == 1]
        elif number == 2:
            parts = [np.frombuffer(one, "<f4") for one in _packed(value, _FIXED32)]
            values = np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)
        elif number == 3:
            numbers = [n for one in _packed(value, _VARINT) for n in _varints(one)]
            values = np.array(numbers, np.uint64).astype(np.int64)
    return values


def _map_entries(message: memoryview) -> Iterator[tuple[str, memoryview]]:
    for number, entry in _messages(message):
        if number != 1:
            continue
        parts = dict(_messages(entry))
        yield bytes(parts.get(1, b"")).decode(), parts.get(2, memoryview(b""))


def _messages(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and bytes of each field that has a length; others are passed over."""
    for number, kind, value in _fields(message):
        if kind == _BYTES:
            yield number, value


def _packed(message: memoryview, alone: int) -> Iterator[memoryview]:
    """Yield the bytes of repeated numbers, packed or each as a field of its own."""
    for number, kind, value in _fields(message):
        if number == 1 and kind in (_BYTES, alone):
            yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yield number, wire type and bytes of each field."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, start = key & 7, at
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _BYTES:
            length, start = _varint(message, at)
            at = start + length
        else:
            raise ValueError(f"a field of wire type {kind}")
        if at > len(message) or not key >> 3:
            raise ValueError("a field reaches beyond its message")
        yield key >> 3, kind, message[start:at]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for count in range(_LONGEST_VARINT):
        if at + count >= len(message):
            break
        byte = message[at + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + count + 1
    raise ValueError("a number is cut short or too long")


def _varints(numbers: memoryview) -> Iterator[int]:
    at = 0
    while at < len(numbers):
        value, at = _varint(numbers, at)
        yield value

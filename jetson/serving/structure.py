"""How much structure a message may have, counted before an object is made of it.

A parser makes whatever a message says: 32 MB of empty lists are seconds of work with the
interpreter held. So a message is walked first, texts and bytes passed over, and refused at the
value that is one too many. `message_pack` walks msgpack, `require_bounded_json` JSON.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class StructureLimits:
    """What a message may hold at most. Names of fields are not counted: each has a value."""

    # Lists and maps inside each other, the outermost counted.
    depth: int
    # All but numbers in lists. Of published clients ALOHA's has most, 28 for four cameras.
    values: int = 64
    # Numbers in lists: the sides of arrays, a state.
    numbers: int = 1024


# An array in an object is three deep.
ACT_LIMITS = StructureLimits(depth=4)
# {"images": {camera: {"shape": [...]}}}, as ALOHA's clients send them.
OPENPI_LIMITS = StructureLimits(depth=4)
# The same in the payload of a message.
VLA_EVAL_LIMITS = StructureLimits(depth=5)
# {"data": {"observation": {"language": {name: [[text]]}}}}: batch and time are lists.
GR00T_LIMITS = StructureLimits(depth=6)
# What a client reads of the server that it chose: GR00T's modalities have 39 values.
REPLY_LIMITS = StructureLimits(depth=8, values=1024)


class StructureCount:
    """What a walk has met so far."""

    def __init__(self, limits: StructureLimits) -> None:
        self._limits = limits
        self._values = 0
        self._numbers = 0

    def add(self, is_listed_number: bool) -> None:
        """Count a value.

        Raises:
            ValueError: it is one too many.
        """
        if is_listed_number:
            self._numbers += 1
        else:
            self._values += 1
        if self._values > self._limits.values:
            raise ValueError(f"more than {self._limits.values} values; send arrays as bytes")
        if self._numbers > self._limits.numbers:
            raise ValueError(
                f"more than {self._limits.numbers} numbers in lists; send arrays as bytes"
            )

    def enter(self, depth: int) -> None:
        """Go into a list or map that is so deep, from 1.

        Raises:
            ValueError: it is deeper than anything may be.
        """
        if depth > self._limits.depth:
            raise ValueError(f"nested more than {self._limits.depth} deep")


# A mark, a quote, or part of what has no quotes: a number or a word.
_TOKEN = re.compile(r'[ \t\n\r]*([][{},:"]|[^][{},:" \t\n\r]{1,600})')
# Tokens, and quotes within texts: 64 fields, 1,024 numbers and an instruction of 2,000 quotes in
# JSON that is itself a text of JSON are 5,000.
_MOST_STEPS = 8192


def require_bounded_json(text: str, limits: StructureLimits) -> None:
    """Walk a text that may be JSON.

    Whether it is JSON is left to the parser, which makes no more objects of it than are counted.

    Raises:
        ValueError: it has too many values, or is nested too deeply.
    """
    count = StructureCount(limits)
    # The marks of the containers around, and the token before.
    around: list[str] = []
    before = ""
    at, is_in_text = 0, False
    for _ in range(_MOST_STEPS):
        if is_in_text:
            end = text.find('"', at)
            if end < 0:
                return
            is_in_text, at = _is_escaped(text, at, end), end + 1
            continue
        token = _TOKEN.match(text, at)
        if token is None:
            return
        mark, at = token[1], token.end()
        if mark in ("]", "}"):
            del around[-1:]
        elif mark not in (",", ":"):
            in_list = around[-1:] == ["["]
            # What follows no colon in an object is the name of what does.
            if in_list or not around or before == ":":
                count.add(in_list and mark[0] in "-0123456789NI")
            if mark in ("[", "{"):
                around.append(mark)
                count.enter(len(around))
            is_in_text = mark == '"'
        before = mark
    raise ValueError(f"more than {limits.values} values; send arrays as bytes")


def _is_escaped(text: str, start: int, end: int) -> bool:
    """Say whether an odd number of backslashes stand before a place, from a start on."""
    if text[end - 1] != "\\":
        return False
    piece = text[start:end]
    return (len(piece) - len(piece.rstrip("\\"))) % 2 == 1

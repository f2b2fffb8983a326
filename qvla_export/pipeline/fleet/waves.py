"""The noun `Wave`: how much of a fleet is updated before anything else is risked."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from qvla_export.shared.errors import QvlaError

DEFAULT_WAVES = ("1", "20%", "100%")
_SIZE = re.compile(r"([1-9]\d{0,6})(%?)")


@dataclass(frozen=True)
class Wave:
    """The robots from `start` to `stop`, which are updated side by side."""

    # As it was asked for.
    size: str
    start: int
    stop: int


def divide(robots: int, sizes: Sequence[str]) -> tuple[Wave, ...]:
    """Divide so many robots into waves.

    Args:
        robots: how many there are.
        sizes: how many robots are up to date after each wave: "1", "20%".

    Raises:
        QvlaError: a size is none, or smaller than the one before.
    """
    waves: list[Wave] = []
    start = 0
    for size in sizes:
        stop = _robots_of(size, robots)
        if stop < start:
            raise QvlaError(
                f"--wave says how many robots are up to date after it, so none may be smaller "
                f"than the one before: {', '.join(sizes)} of {robots}"
            )
        # In a small fleet 20% may be no more robots than the first.
        if stop > start:
            waves.append(Wave(size, start, stop))
        start = stop
    return tuple(waves)


def _robots_of(size: str, robots: int) -> int:
    found = _SIZE.fullmatch(size)
    if found is None or (found[2] and int(found[1]) > 100):
        raise QvlaError(
            f"--wave must be a number of robots or of per cent, 1 or 20%, got {size!r:.40}"
        )
    count = math.ceil(robots * int(found[1]) / 100) if found[2] else int(found[1])
    return min(count, robots)

"""Drawing frames from one episode, with others in place of bad ones."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from calibration.sources.base import BadFrame
from qvla_export.shared.observation import Observation

# An episode to draw from: its number of frames, and what reads one of them.
Drawable = tuple[int, Callable[[int], Observation]]


def draw_frames(
    episode: Drawable, random: np.random.Generator, most: int, skipped: list[int] | None
) -> list[Observation]:
    """Read frames of an episode, in order.

    Args:
        episode: where to draw.
        random: decides which frames.
        most: frames to draw, where the episode has as many.
        skipped: takes the numbers of bad frames, whose places others take; None to refuse them.

    Raises:
        BadFrame: a frame has no usable state or instruction, and such are not left out.
    """
    length, observation = episode
    rows = np.sort(random.choice(length, size=min(most, length), replace=False))
    if skipped is None:
        return [observation(int(row)) for row in rows]
    good: dict[int, Observation] = {}
    others: NDArray[np.int64] | None = None
    while len(rows):
        for row in map(int, rows):
            try:
                good[row] = observation(row)
            except BadFrame:
                skipped.append(row)
        if others is None and len(good) < min(most, length):
            others = random.permutation(np.setdiff1d(np.arange(length), rows))
        if others is None:
            break
        missing = most - len(good)
        rows, others = others[:missing], others[missing:]
    return [good[row] for row in sorted(good)]

"""Drawing frames from one episode, with others in place of bad ones."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.sources.base import BadFrame
from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class Drawable:
    """An episode to draw from."""

    # Of its frames.
    length: int
    # Reads what is seen at a frame.
    observation: Callable[[int], Observation]
    # Reads the recorded actions from a frame on.  float32 [n, dim]
    following: Callable[[int], NDArray[np.float32]]


def draw_frames(
    episode: Drawable, random: np.random.Generator, most: int, skipped: list[int] | None
) -> dict[int, Observation]:
    """Read frames of an episode: frame number -> what is seen there, in order.

    Args:
        episode: where to draw.
        random: decides which frames.
        most: frames to draw, where the episode has as many.
        skipped: takes the numbers of bad frames, whose places others take; None to refuse them.

    Raises:
        BadFrame: a frame has no usable state or instruction, and such are not left out.
    """
    length, observation = episode.length, episode.observation
    rows = np.sort(random.choice(length, size=min(most, length), replace=False))
    if skipped is None:
        return {int(row): observation(int(row)) for row in rows}
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
    return dict(sorted(good.items()))

"""Which frames of an episode are drawn, with others in place of bad ones."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.sources.base import BadFrame
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class Drawable:
    """An episode to draw from."""

    # Its number, and how many frames it has.
    number: int
    length: int
    # Raises BadFrame where a frame has no usable state or instruction; decodes no pictures if it
    # can do without.
    check: Callable[[int], object]
    # Reads what is seen at a frame.
    observation: Callable[[int], Observation]
    # Reads the recorded actions from a frame on.  float32 [n, dim]
    following: Callable[[int], NDArray[np.float32]]


@dataclass(frozen=True)
class DrawnRows:
    """Frames of one episode that were drawn, in order; none is read yet."""

    episode: Drawable
    rows: tuple[int, ...]
    # How many bad ones were left out.
    skipped: int = 0


def draw_parts(
    episodes: Iterable[Drawable],
    counts: Sequence[int],
    frames: int,
    seed: int,
    skip_bad: bool,
) -> list[list[DrawnRows]]:
    """Choose frames of episodes in turn, for several parts that share none.

    Args:
        episodes: where to draw; one after the other is used up.
        counts: frames of each part.
        frames: of one episode, at most.
        seed: decides which frames.
        skip_bad: whether others take the places of bad frames; if not, none is looked at.

    Raises:
        QvlaError: the episodes are too short.
    """
    random = np.random.default_rng((seed, 1))
    ordered = iter(episodes)
    parts: list[list[DrawnRows]] = [[] for _ in counts]
    for part, count in zip(parts, counts, strict=True):
        while (missing := count - sum(len(drawn.rows) for drawn in part)) > 0:
            episode = next(ordered, None)
            if episode is None:
                raise QvlaError(
                    f"the episodes are too short for {' + '.join(map(str, counts))} observations, "
                    f"{frames} of each; ask for fewer or record more"
                )
            part.append(_draw_frames(episode, random, min(frames, missing), skip_bad))
    return parts


def _draw_frames(
    episode: Drawable, random: np.random.Generator, most: int, skip_bad: bool
) -> DrawnRows:
    """Choose frames of an episode, `most` where it has as many."""
    length = episode.length
    rows = np.sort(random.choice(length, size=min(most, length), replace=False))
    if not skip_bad:
        return DrawnRows(episode, tuple(map(int, rows)))
    good: list[int] = []
    skipped = 0
    others: NDArray[np.int64] | None = None
    while len(rows):
        for row in map(int, rows):
            try:
                episode.check(row)
                good.append(row)
            except BadFrame:
                skipped += 1
        if others is None and len(good) < min(most, length):
            others = random.permutation(np.setdiff1d(np.arange(length), rows))
        if others is None:
            break
        missing = most - len(good)
        rows, others = others[:missing], others[missing:]
    return DrawnRows(episode, tuple(sorted(good)), skipped)

"""How many observations a data set gives: what was asked for, or what a small one has."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DrawSize:
    """Observations to draw."""

    # To measure on, and to judge by, from other episodes.
    count: int
    held_out: int
    # Of one episode.
    frames: int


def fitting_size(lengths: Sequence[int], wish: DrawSize, frames_fixed: bool = False) -> DrawSize:
    """Return the wish where the episodes give as much, else the most of it that they do.

    More frames of an episode make up for few episodes; where even all frames are too few, the
    episodes are split as the wish has it. Of fewer than two episodes nothing fits.

    Args:
        lengths: frames of the episodes, in the order they are drawn in.
        wish: what is asked for.
        frames_fixed: whether the frames of an episode may not be raised.
    """
    if len(lengths) < 2:
        return wish
    longest = max(lengths)
    for frames in range(wish.frames, wish.frames + 1 if frames_fixed else longest + 1):
        if _fits(lengths, replace(wish, frames=frames)):
            return replace(wish, frames=frames)
    frames = wish.frames if frames_fixed else max(wish.frames, longest)
    share = wish.count / (wish.count + wish.held_out)
    first = min(max(1, round(share * len(lengths))), len(lengths) - 1)
    given = [min(frames, length) for length in lengths]
    counts = min(wish.count, sum(given[:first])), min(wish.held_out, sum(given[first:]))
    return DrawSize(*counts, frames)


def _fits(lengths: Sequence[int], wish: DrawSize) -> bool:
    """Whether the episodes, drawn one after another, give as much as is asked for."""
    ordered = iter(lengths)
    for wanted in (wish.count, wish.held_out):
        missing = wanted
        while missing > 0:
            length = next(ordered, None)
            if length is None:
                return False
            missing -= min(wish.frames, length)
    return True

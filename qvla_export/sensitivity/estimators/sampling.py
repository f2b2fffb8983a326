"""Samples of (channel, width) pairs that cover every layer and every width."""

from collections.abc import Mapping, Sequence

import numpy as np

from qvla_export.sensitivity.estimators.base import ChannelWidth
from qvla_export.shared.errors import QvlaError


def stratified_pairs(
    shapes: Mapping[str, tuple[int, int]], widths: Sequence[int], count: int, seed: int
) -> list[ChannelWidth]:
    """Draw at least `count` pairs: of each layer at each width its share, and at least one.

    Args:
        shapes: layer name -> (channels, weights of one channel).
        widths: at least one.
        count: at least 3; if there are fewer pairs, all are drawn.
        seed: of the drawing.

    Raises:
        QvlaError: fewer than 3 pairs are asked for, which have no ranks to speak of.
    """
    if count < 3:
        raise QvlaError(f"comparing ranks takes at least 3 (channel, width) pairs, got {count}")
    random = np.random.default_rng(seed)
    whole = len(widths) * sum(channels for channels, _ in shapes.values())
    share = min(1.0, count / whole)
    drawn = []
    for name, (channels, _) in shapes.items():
        for bits in widths:
            # Rounded up, so that there are never fewer than asked for.
            many = int(np.ceil(share * channels))
            chosen = np.sort(random.choice(channels, many, replace=False))
            drawn += [ChannelWidth(name, channel, bits) for channel in chosen.tolist()]
    return drawn

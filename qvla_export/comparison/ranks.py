"""Ranks of channels by one decision and along episodes: the paper's Fig. 7."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qvla_export.comparison.comparison import Ranks
from qvla_export.sensitivity.agreement import rank_correlation

# Ranks that differ by no more than this share of their number count as near the diagonal.
_NEAR = 0.1


def rank_channels(
    bits: int,
    observations: tuple[int, int],
    single: Mapping[str, NDArray[np.float32]],
    along: Mapping[str, NDArray[np.float32]],
    count: int = 1000,
    seed: int = 0,
) -> Ranks:
    """Draw channels and rank them twice.

    Args:
        bits: of the sensitivities.
        observations: of either kind.
        single: layer -> sensitivities of one decision.  float [channels]
        along: layer -> the same along episodes.
        count: channels to draw; all if there are fewer.
        seed: of the drawing.
    """
    names = [(layer, channel) for layer, values in single.items() for channel in range(len(values))]
    random = np.random.default_rng(seed)
    drawn = np.sort(random.choice(len(names), min(count, len(names)), replace=False))
    chosen = [names[i] for i in drawn]
    first = np.array([single[layer][channel] for layer, channel in chosen], np.float64)
    second = np.array([along[layer][channel] for layer, channel in chosen], np.float64)
    ranks = [
        np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (first, second)
    ]
    near = np.abs(ranks[0] - ranks[1]) <= _NEAR * len(chosen)
    return Ranks(
        bits,
        observations,
        tuple(
            (n, c, float(a), float(b)) for (n, c), a, b in zip(chosen, first, second, strict=True)
        ),
        rank_correlation(first, second),
        float(near.mean()),
    )

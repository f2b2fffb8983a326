"""The statistics LeRobotDataset v3.0 keeps of every feature, per episode and overall."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.sources.image_codec import decode_png

# Name of a statistic -> value; arrays have the feature's shape, [3, 1, 1] for images.
Stats = dict[str, NDArray[Any]]

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
# Pictures an episode's image statistics are computed from.
_SAMPLED_IMAGES = 8


def vector_stats(values: NDArray[Any]) -> Stats:
    """Return the statistics of rows [n, dim]."""
    exact = values.astype(np.float64)
    stats: Stats = {
        "min": exact.min(0),
        "max": exact.max(0),
        "mean": exact.mean(0),
        "std": exact.std(0),
        "count": np.array([len(exact)]),
    }
    quantiles = np.quantile(exact, list(_QUANTILES.values()), axis=0)
    return stats | dict(zip(_QUANTILES, quantiles, strict=True))


def image_stats(pngs: Sequence[bytes]) -> Stats:
    """Return the statistics of evenly spread pictures, by channel, in 0..1."""
    chosen = np.unique(np.linspace(0, len(pngs) - 1, _SAMPLED_IMAGES).round().astype(int))
    pixels = np.concatenate([decode_png(pngs[i]).reshape(-1, 3) for i in chosen])
    # Of 256 values a histogram holds all there is to know, and sorts nothing.
    counts = np.stack([np.bincount(pixels[:, channel], minlength=256) for channel in range(3)])
    levels = np.arange(256) / 255.0
    share = counts / len(pixels)
    mean = share @ levels
    stats = {
        "min": levels[(counts > 0).argmax(1)],
        "max": levels[255 - (counts > 0)[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0.0)),
    }
    cumulative = np.cumsum(counts, axis=1)
    for name, quantile in _QUANTILES.items():
        stats[name] = levels[(cumulative >= quantile * len(pixels)).argmax(1)]
    shaped: Stats = {name: value.reshape(3, 1, 1) for name, value in stats.items()}
    return shaped | {"count": np.array([len(chosen)])}


def merge_stats(parts: Sequence[Mapping[str, NDArray[Any]]]) -> Stats:
    """Combine episodes' statistics; quantiles become count-weighted means of theirs."""
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    counts = stacked["count"]
    weights = (counts / counts.sum()).reshape(-1, *[1] * (stacked["mean"].ndim - 1))
    mean = (weights * stacked["mean"]).sum(0)
    variance = stacked["std"] ** 2 + (stacked["mean"] - mean) ** 2
    return {
        "min": stacked["min"].min(0),
        "max": stacked["max"].max(0),
        "mean": mean,
        "std": np.sqrt((weights * variance).sum(0)),
        "count": counts.sum(0),
        **{name: (weights * stacked[name]).sum(0) for name in _QUANTILES},
    }

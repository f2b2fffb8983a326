"""The noun `StandardError`: how well sensitivities are known, from squares summed beside them.

An observation's value is its mean over probes; observations are independent draws, and so are the
probes of each. Whoever reads sensitivities reads this, so torch is not imported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Sums = Mapping[str, NDArray[np.float64]]
# Among the sums, of all layers together; no layer has this name.  [probes, observations, widths]
WHOLE = "#whole"


@dataclass(frozen=True)
class Spread:
    """Relative standard errors of one quantity at every width."""

    error: tuple[float, ...]
    # Were only the probes drawn anew, on these very observations.
    by_probes: tuple[float, ...]


@dataclass(frozen=True)
class StandardError:
    """How far sensitivities may be from those of all such observations and probes, relatively.

    Of the mean over observations, each with probes of its own; 0.1 means 10 %. What is None or
    empty is missing in files written before it was recorded.
    """

    # Of the sum over a layer's channels at one width: the largest of all layers and widths.
    layers: float
    # The same where only the probes were drawn anew, on these very observations.
    layers_by_probes: float
    # Of one channel at one width: the median of all.
    channels: float
    # Of the sum over a layer's channels at one width: the median of all layers and widths.
    median: float | None = None
    median_by_probes: float | None = None
    # Of the same sum of the "median layer" and the "worst layer" of each width, and of the sum over
    # "all layers".
    by_width: Mapping[str, Spread] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what a file holds: nothing of what is missing, so that its digest stays."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "StandardError":
        """Read what `to_json` made."""
        spreads = {
            name: Spread(tuple(spread["error"]), tuple(spread["by_probes"]))
            for name, spread in value.get("by_width", {}).items()
        }
        return StandardError(**{**value, "by_width": spreads})


def empty_sums(channels: Mapping[str, int], widths: int) -> dict[str, NDArray[np.float64]]:
    """Return zeros: each layer's sums [widths, channels], their squares, and the layer's moments.

    The moments, [2, widths], are of the sum over channels: sum over observations of its square,
    and of the variance that its probes leave.
    """
    empty = {}
    for name, count in channels.items():
        empty[name] = np.zeros((widths, count))
        empty[_squares(name)] = np.zeros((widths, count))
        empty[_moments(name)] = np.zeros((2, widths))
    return empty


def empty_whole(probes: int | None, observations: int, widths: int) -> NDArray[np.float64]:
    """Return zeros for `WHOLE`: of each probe of each observation, the sum over all channels.

    Of the whole Jacobian (None) only the sum over it.
    """
    return np.zeros((probes or 1, observations, widths))


def add_moments(
    sums: Sums, name: str, means: "Tensor", layer_sums: "Tensor", sampled: bool
) -> None:
    """Add what a batch says about a layer's spread.

    Args:
        sums: of all layers, and of `WHOLE` this batch's observations; added to in place.
        name: of the layer.
        means: each observation's mean over probes.  float64 [B, widths, channels]
        layer_sums: of each probe, the sum over channels.  float64 [probes, B, widths]
        sampled: the probes are random, not the whole Jacobian.
    """
    sums[_squares(name)][:] += means.square().sum(dim=0).cpu().numpy()
    moments = sums[_moments(name)]
    moments[0] += means.sum(dim=-1).square().sum(dim=0).cpu().numpy()
    if sampled and len(layer_sums) > 1:
        moments[1] += (layer_sums.var(dim=0) / len(layer_sums)).sum(dim=0).cpu().numpy()
    kept = layer_sums if sampled else layer_sums.sum(dim=0, keepdim=True)
    sums[WHOLE][:] += kept.cpu().numpy()


def standard_error(sums: Sums, names: Sequence[str]) -> StandardError | None:
    """Return the relative standard errors; None of fewer than two observations.

    Args:
        sums: of all observations.
        names: of the layers.
    """
    count = sums[WHOLE].shape[1]
    if count < 2:
        return None
    values = np.stack([sums[name].sum(axis=1) for name in names])
    moments = np.stack([sums[_moments(name)] for name in names], axis=1)
    layers = _relative(values, moments[0], count)
    channels = [_relative(sums[n], sums[_squares(n)], count).ravel() for n in names]
    with np.errstate(divide="ignore", invalid="ignore"):
        by_probes = np.sqrt(moments[1]) / values
    return StandardError(
        layers=_six_digits(_finite(np.max, layers)),
        layers_by_probes=_six_digits(_finite(np.max, by_probes)),
        channels=_six_digits(_finite(np.median, np.concatenate(channels))),
        median=_six_digits(_finite(np.median, layers)),
        median_by_probes=_six_digits(_finite(np.median, by_probes)),
        by_width={
            "median layer": _spread(np.median, layers, by_probes),
            "worst layer": _spread(np.max, layers, by_probes),
            "all layers": _spread(np.max, *_of_whole(sums[WHOLE])),
        },
    )


def _of_whole(
    whole: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the standard error of the sum over all layers, and by probes.  [1, widths] each"""
    probes, count, _ = whole.shape
    means = whole.sum(axis=0) / probes
    by_probes = np.square(whole - means).sum(axis=0) / max(probes - 1, 1) / probes
    total = means.sum(axis=0, keepdims=True)
    error = _relative(total, np.square(means).sum(axis=0, keepdims=True), count)
    with np.errstate(divide="ignore", invalid="ignore"):
        return error, np.sqrt(by_probes.sum(axis=0, keepdims=True)) / total


def _relative(
    total: NDArray[np.float64], squares: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    """Standard error of a mean over its size, from sum and sum of squares; NaN of a zero sum."""
    mean = total / count
    variance = np.maximum(squares - count * mean**2, 0.0) / (count - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative: NDArray[np.float64] = np.sqrt(variance / count) / mean
    return relative


def _spread(
    of_layers: Callable[..., Any], error: NDArray[np.float64], by_probes: NDArray[np.float64]
) -> Spread:
    """Bring [layers, widths] together by width."""
    errors, probes = (
        tuple(_six_digits(_finite(of_layers, column)) for column in found.T)
        for found in (error, by_probes)
    )
    return Spread(errors, probes)


def _finite(of_values: Callable[..., Any], values: NDArray[np.float64]) -> float:
    """NaN stands for the error of a zero."""
    finite = values[np.isfinite(values)]
    return float(of_values(finite)) if len(finite) else 0.0


def _six_digits(value: float) -> float:
    """Round: the last digits depend on the order in which processes' shares were added."""
    return float(f"{value:.6g}")


def _squares(name: str) -> str:
    return f"{name}#squares"


def _moments(name: str) -> str:
    return f"{name}#moments"

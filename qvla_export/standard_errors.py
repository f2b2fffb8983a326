"""Standard errors of sensitivities, from sums of squares that are kept beside the sums.

An observation's value is its mean over probes; observations are independent draws, and so are the
probes of each.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.sensitivity import StandardError

# An observation's forward pass and output errors take as long as so many probes; measured on the
# reference policy at four widths.
_PASS_COST = 3.0
# Two tell how far probes differ.
_FEWEST_PROBES = 2
MOST_PROBES = 64

Sums = Mapping[str, NDArray[np.float64]]


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


def add_moments(
    sums: Sums, name: str, means: Tensor, layer_sums: Sequence[Tensor], sampled: bool
) -> None:
    """Add what a batch says about a layer's spread.

    Args:
        sums: of all layers; added to in place.
        name: of the layer.
        means: each observation's mean over probes.  float64 [B, widths, channels]
        layer_sums: of each probe, the sum over channels.  float64 [B, widths] each
        sampled: the probes are random, not the whole Jacobian.
    """
    sums[_squares(name)][:] += means.square().sum(dim=0).cpu().numpy()
    moments = sums[_moments(name)]
    moments[0] += means.sum(dim=-1).square().sum(dim=0).cpu().numpy()
    if sampled and len(layer_sums) > 1:
        variance = torch.stack(list(layer_sums)).var(dim=0) / len(layer_sums)
        moments[1] += variance.sum(dim=0).cpu().numpy()


def standard_error(sums: Sums, names: Sequence[str], observations: int) -> StandardError | None:
    """Return the relative standard errors; None of fewer than two observations."""
    if observations < 2:
        return None
    layers, by_probes, channels = [], [], []
    for name in names:
        values, moments = sums[name], sums[_moments(name)]
        whole = values.sum(axis=1)
        layers.append(_relative(whole, moments[0], observations))
        with np.errstate(divide="ignore", invalid="ignore"):
            by_probes.append(np.sqrt(moments[1]) / whole)
        channels.append(_relative(values, sums[_squares(name)], observations).ravel())
    return StandardError(
        layers=_largest(layers),
        layers_by_probes=_largest(by_probes),
        channels=_median(np.concatenate(channels)),
    )


def wanted_probes(
    sums: Sums,
    names: Sequence[str],
    done: Sequence[tuple[int, int]],
    observations: int,
    bound: float,
) -> int:
    """Return how many probes the observations to come should have each.

    The cheapest number for the layer and width that are farthest from the bound: few where
    observations differ more than probes, since a new observation brings new probes as well; as
    many as the bound takes where there are no more observations.

    Args:
        sums: so far.
        names: of the layers.
        done: (observations, probes of each) of what is in the sums; at least 2 of each.
        observations: that there are in all.
        bound: relative standard error that is asked for.
    """
    count = sum(many for many, _ in done)
    whole = np.concatenate([sums[name].sum(axis=1) for name in names]) / count
    moments = np.concatenate([sums[_moments(name)] for name in names], axis=1)
    seen = whole > 0
    whole, moments = whole[seen], moments[:, seen]
    if not len(whole):
        return _FEWEST_PROBES
    # Relative variances: of an observation as measured, and of one probe of an observation.
    measured = np.maximum(moments[0] - count * whole**2, 0) / (count - 1) / whole**2
    probe = moments[1] / sum(many / probes for many, probes in done) / whole**2
    worst = int(measured.argmax())
    of_probe = float(probe[worst])
    between = max(0.0, float(measured[worst] - moments[1][worst] / count / whole[worst] ** 2))
    cheapest = np.sqrt(_PASS_COST * of_probe / between) if between else np.inf
    room = observations * bound**2 - between
    needed = of_probe / room if room > 0 else 0.0
    return int(np.clip(np.ceil(max(cheapest, needed)), _FEWEST_PROBES, MOST_PROBES))


def _relative(
    total: NDArray[np.float64], squares: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    """Standard error of a mean over its size, from sum and sum of squares; NaN of a zero sum."""
    mean = total / count
    variance = np.maximum(squares - count * mean**2, 0.0) / (count - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative: NDArray[np.float64] = np.sqrt(variance / count) / mean
    return relative


def _largest(found: Sequence[NDArray[np.float64]]) -> float:
    values = np.concatenate(found)
    finite = values[np.isfinite(values)]
    return _told(finite.max()) if len(finite) else 0.0


def _median(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return _told(np.median(finite)) if len(finite) else 0.0


def _told(value: float) -> float:
    """Six digits: the last ones depend on the order in which processes' shares were added."""
    return float(f"{value:.6g}")


def _squares(name: str) -> str:
    return f"{name}#squares"


def _moments(name: str) -> str:
    return f"{name}#moments"

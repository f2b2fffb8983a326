"""The noun `ActivationStatistics`: histograms of layer inputs, and the ranges chosen from them.

numpy only; `measurement.measure_activations` fills them. The bins of a histogram are a power of
two wide and there are always as many: when a larger |x| comes, pairs of bins merge. No number moves
between bins by rounding, so the order of the observations does not matter, nor how they were split.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.activations import (
    ACTIVATION_CODES,
    IMAGE_METHODS,
    TOKEN_SHARES,
    ActivationRanges,
    HistogramMethod,
    RangeMethod,
    storable_range,
)
from qvla_export.shared.artifacts import require_fields, versions
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.tensor_files import read_tensor_file, write_tensor_file

BINS = 8192
# Share of the numbers that the "percentile" rule represents.
PERCENTILE = 0.9999
_FORMAT = "qvla-activations-2"
_FIELDS = ("groups", "convolutions", "samples", "policy_digest", "calibration_digest", "versions")
# Bins start this narrow: 2^-40 * BINS holds nothing but zeros.
_FIRST_EXPONENT = -40
# Ranges to try, as shares of the largest |x|: sixteen an octave, down to 1/16. Further down a bin
# holds few codes, and the divergence no longer sees what rounding loses.
_SHARES = 2.0 ** (-np.arange(65) / 16)
_LOG = logging.getLogger(__name__)


@dataclass
class Histogram:
    """Counts of |x| in `BINS` equal bins from 0, each 2^exponent wide, and the largest |x|."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    exponent: int = _FIRST_EXPONENT
    largest: float = 0.0

    def widen(self, largest: float) -> None:
        """Merge bins until a number of this size has one."""
        self.largest = max(self.largest, largest)
        while self.largest >= BINS * self.width:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([pairs, np.zeros(BINS // 2, np.int64)])
            self.exponent += 1

    @property
    def width(self) -> float:
        """Width of a bin."""
        return float(2.0**self.exponent)

    def range(self, method: HistogramMethod, bits: int) -> float:
        """Return the |x| that the highest code should stand for; 1 if all numbers were 0."""
        if self.largest == 0:
            return 1.0
        if method == "max":
            return self.largest
        if method == "percentile":
            reached = np.cumsum(self.counts) >= PERCENTILE * self.counts.sum()
            return min(self.largest, (int(np.argmax(reached)) + 1) * self.width)
        used = np.flatnonzero(self.counts)
        centres = (used.astype(np.float64) + 0.5) * self.width
        counts = self.counts[used].astype(np.float64)
        cost = _squared_error if method == "mse" else _divergence
        highest = ACTIVATION_CODES[bits][1]
        limits = self.largest * _SHARES
        costs = [cost(centres, counts, limit / highest, highest) for limit in limits]
        return float(limits[int(np.argmin(costs))])


def _squared_error(
    centres: NDArray[np.float64], counts: NDArray[np.float64], scale: float, highest: int
) -> float:
    rounded = np.minimum(np.rint(centres / scale), highest) * scale
    return float(counts @ np.square(rounded - centres))


def _divergence(
    centres: NDArray[np.float64], counts: NDArray[np.float64], scale: float, highest: int
) -> float:
    """Kullback-Leibler divergence of the numbers from what their codes tell of them.

    As in the calibration of TensorRT's 8-bit engines (Migacz, GTC 2017): numbers beyond the range
    join its last bin; each code's count spreads evenly over the occupied bins that share it.
    """
    inside = int(np.searchsorted(centres, (highest + 0.5) * scale))
    if inside == 0:
        return float(np.inf)
    clipped = counts[:inside].copy()
    codes = np.rint(centres[:inside] / scale).astype(np.int64)
    told = np.bincount(codes, weights=clipped) / np.maximum(np.bincount(codes), 1)
    clipped[-1] += counts[inside:].sum()
    actual, modelled = clipped / clipped.sum(), told[codes] / told[codes].sum()
    return float(actual @ np.log(actual / modelled))


@dataclass(frozen=True)
class ActivationStatistics:
    """Histograms of the inputs of a policy's quantizable layers on calibration observations."""

    # Layers that share an input -> its histogram, in forward order; every layer once.
    histograms: Mapping[tuple[str, ...], Histogram]
    # Observations.
    samples: int
    policy_digest: str
    calibration_digest: str
    # Layers that are fed images, which have no tokens.
    convolutions: frozenset[str] = frozenset()
    made_with: Mapping[str, str] = field(default_factory=versions)

    def ranges(self, bits: int, method: RangeMethod) -> ActivationRanges:
        """Choose every layer's range.

        Args:
            bits: 8, or 4 for simulation.
            method: "max": the largest |x|. "percentile": 99.99 % of the numbers. "mse": the least
                squared error. "entropy": the least divergence of the distributions. "token": a
                share of each token's largest |x|, found anew in every run; of convolutions one
                range, see `IMAGE_METHODS`.

        Raises:
            QvlaError: an unknown width or method.
        """
        if bits not in ACTIVATION_CODES:
            raise QvlaError(f"activations have 8 bits, or 4 in simulation, got {bits!r}")
        found: dict[str, float] = {}
        per_token: frozenset[str] = frozenset()
        for layers, histogram in self.histograms.items():
            if method == "token" and not self.convolutions.intersection(layers):
                limit = TOKEN_SHARES[bits]
                per_token |= set(layers)
            else:
                limit = histogram.range(IMAGE_METHODS[bits] if method == "token" else method, bits)
            found.update(dict.fromkeys(layers, storable_range(limit, bits)))
        return ActivationRanges(bits, method, found, per_token)

    def save(self, path: Path) -> None:
        """Write safetensors with the provenance as metadata, atomically."""
        groups = list(self.histograms)
        found = list(self.histograms.values())
        tensors = {
            "counts": np.stack([h.counts for h in found]),
            "exponents": np.array([h.exponent for h in found], np.int64),
            "largest": np.array([h.largest for h in found], np.float64),
        }
        provenance = {
            "format": _FORMAT,
            "groups": groups,
            "convolutions": sorted(self.convolutions),
            "samples": self.samples,
            "policy_digest": self.policy_digest,
            "calibration_digest": self.calibration_digest,
            "versions": dict(self.made_with),
        }
        write_tensor_file(path, tensors, provenance)

    @staticmethod
    def load(path: Path) -> "ActivationStatistics":
        """Read statistics.

        Raises:
            ArtifactError: the file is missing, truncated, damaged or of another kind.
        """
        tensors, value = read_tensor_file(path, _FORMAT, "activation statistics")
        require_fields(value, _FIELDS, f"activation statistics {path}")
        try:
            return ActivationStatistics(
                histograms=_histograms(value["groups"], tensors),
                samples=int(value["samples"]),
                policy_digest=value["policy_digest"],
                calibration_digest=value["calibration_digest"],
                convolutions=frozenset(value["convolutions"]),
                made_with=value["versions"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"activation statistics {path} are damaged: {error}") from error


def _histograms(
    groups: Sequence[Sequence[str]], tensors: Mapping[str, NDArray[Any]]
) -> dict[tuple[str, ...], Histogram]:
    rows = zip(groups, tensors["counts"], tensors["exponents"], tensors["largest"], strict=True)
    return {
        tuple(names): Histogram(counts.astype(np.int64), int(exponent), float(largest))
        for names, counts, exponent, largest in rows
    }

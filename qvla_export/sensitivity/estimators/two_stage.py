"""Two stages (section 3.3.1): a proxy ranks all channels, the most important are measured exactly.

The rest keeps the proxy's values, in the exact values' scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.sensitivity.estimators.base import (
    QUIETLY,
    ChannelWidth,
    Estimator,
    Question,
    Work,
    looked_up,
)
from qvla_export.sensitivity.estimators.exact import ExactEstimator
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError


@dataclass(frozen=True)
class TwoStage:
    """The proxy's values, but exact ones for a share of the channels, at every width."""

    proxy: Estimator
    # Of all channels, those with the largest sensitivities by the proxy.
    share: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise QvlaError(f"the share measured exactly must be in (0, 1], got {self.share}")

    @property
    def method(self) -> str:
        """Return the name that is recorded."""
        return f"two-stage, {self.proxy.method}, then exact"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return those of the proxy, and the share."""
        return {**self.proxy.settings, "share": self.share}

    @property
    def exact_share(self) -> float:
        """Return the share of the second stage."""
        return self.share

    def table(self, question: Question, work: Work = QUIETLY) -> Sensitivities:
        """Estimate every channel at every width."""
        first = self.proxy.table(question, work.step("proxy"))
        chosen = most_important(first, self.share)
        pairs = [ChannelWidth(*channel, bits) for channel in chosen for bits in question.widths]
        exact = ExactEstimator().of_pairs(question, pairs, work.step("exact"))
        factors = scale_corrections(pairs, looked_up(first, pairs), exact)
        by_width = np.array([factors[bits] for bits in question.widths])[:, None]
        values = {n: (found * by_width).astype(np.float32) for n, found in first.values.items()}
        for pair, value in zip(pairs, exact, strict=True):
            values[pair.layer][question.widths.index(pair.bits), pair.channel] = value
        # The proxy's error is no longer that of all values.
        return replace(
            first,
            values=values,
            method=self.method,
            settings=self.settings,
            standard_error=None,
        )

    def of_pairs(
        self, question: Question, pairs: Sequence[ChannelWidth], work: Work = QUIETLY
    ) -> NDArray[np.float64]:
        """Estimate some pairs: of these, the important ones of all are measured exactly.

        The scale of the rest comes from just these; `table` has it from more.  float64 [pairs]
        """
        first = self.proxy.table(question, work.step("proxy"))
        chosen = set(most_important(first, self.share))
        estimated = looked_up(first, pairs)
        again = [i for i, pair in enumerate(pairs) if (pair.layer, pair.channel) in chosen]
        if not again:
            return estimated
        important = [pairs[i] for i in again]
        exact = ExactEstimator().of_pairs(question, important, work.step("exact"))
        factors = scale_corrections(important, estimated[again], exact)
        corrected: NDArray[np.float64] = estimated * np.array(
            [factors.get(pair.bits, 1.0) for pair in pairs]
        )
        corrected[again] = exact
        return corrected


def most_important(table: Sensitivities, share: float) -> list[tuple[str, int]]:
    """Return the channels (layer, channel) that matter most, at least one; most important first.

    Each width has an equal say: a channel counts by its share of all sensitivity at that width.
    """
    stacked = np.concatenate([v.astype(np.float64) for v in table.values.values()], axis=1)
    totals = stacked.sum(axis=1, keepdims=True)
    importance = np.divide(stacked, totals, out=np.zeros_like(stacked), where=totals > 0).sum(
        axis=0
    )
    names = [(name, c) for name, v in table.values.items() for c in range(v.shape[1])]
    count = max(1, round(share * len(names)))
    return [names[i] for i in np.argsort(-importance, kind="stable")[:count]]


def scale_corrections(
    pairs: Sequence[ChannelWidth], estimated: NDArray[np.float64], exact: NDArray[np.float64]
) -> dict[int, float]:
    """Return for each width how much larger exact values are than estimated ones.

    The median of the ratios: the largest sensitivities, where first order is worst, do not decide.

    Args:
        pairs: that were measured both ways.
        estimated, exact: their values.  float64 [pairs]
    """
    bits = np.array([pair.bits for pair in pairs])
    factors = {}
    for width in np.unique(bits).tolist():
        both = (bits == width) & (estimated > 0) & (exact > 0)
        factors[width] = float(np.median(exact[both] / estimated[both])) if both.any() else 1.0
    return factors

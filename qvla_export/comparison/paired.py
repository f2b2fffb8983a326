"""Two policies on the same episodes: the difference of their success, with an interval."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from qvla_export.shared.errors import QvlaError

_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class PairedDifference:
    """Success of a policy minus that of a reference on the same episodes.

    The interval is Newcombe's for paired proportions (Statistics in Medicine 17, 1998, method 10):
    two Wilson intervals, squared and added, less what pairing makes them share; wider by the root
    of the design effect where episodes share a scene. p is of McNemar's exact test, which takes
    episodes for independent.
    """

    episodes: int
    # Solved by the policy alone, and by the reference alone.
    gained: int
    lost: int
    low: float
    high: float
    p_value: float
    # Variance of the difference over that of independent episodes, 1 at least (Kish 1965).
    design_effect: float = 1.0

    @property
    def value(self) -> float:
        """Return the difference of the shares of solved episodes, -1 to 1."""
        return (self.gained - self.lost) / self.episodes


@dataclass(frozen=True)
class MeanDifference:
    """Mean over episodes of a figure minus that of a reference, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def mean_difference(differences: Sequence[float], clusters: Sequence[Hashable]) -> MeanDifference:
    """Return the mean of paired differences; the interval takes clusters for independent.

    Normal, with the variance of the sums over clusters (Liang and Zeger, Biometrika 73, 1986, with
    the factor n / (n - 1) of n clusters).

    Args:
        differences: of each episode.
        clusters: what each shares with others, such as its scene.

    Raises:
        QvlaError: there are fewer than two clusters.
    """
    mean = math.fsum(differences) / max(len(differences), 1)
    sums = _cluster_sums(differences, mean, clusters)
    if len(sums) < 2:
        raise QvlaError(f"an interval needs episodes of at least two scenes, got {len(sums)}")
    squares = math.fsum(total**2 for total in sums) * len(sums) / (len(sums) - 1)
    reach = _NORMAL_95 * math.sqrt(squares) / len(differences)
    return MeanDifference(mean, mean - reach, mean + reach)


def paired_difference(
    solved: Sequence[bool],
    reference: Sequence[bool],
    clusters: Sequence[Hashable] | None = None,
) -> PairedDifference:
    """Compare episode by episode.

    Args:
        solved: of the policy, at least one.
        reference: of the reference, of the same episodes in the same order.
        clusters: what each episode shares with others, such as its scene; None for independent
            ones.

    Raises:
        QvlaError: there are none, or not as many of both.
    """
    count = len(solved)
    if not count or count != len(reference):
        raise QvlaError(
            f"paired episodes must be as many of both policies and at least one, got {count} and "
            f"{len(reference)}"
        )
    pairs = list(zip(map(bool, solved), map(bool, reference), strict=True))
    both, gained = pairs.count((True, True)), pairs.count((True, False))
    lost, neither = pairs.count((False, True)), pairs.count((False, False))
    ours, theirs = (both + gained) / count, (both + lost) / count
    our_low, our_high = wilson_95(both + gained, count)
    their_low, their_high = wilson_95(both + lost, count)
    shared = _correlation(both, gained, lost, neither)

    def reach(mine: float, other: float) -> float:
        return math.sqrt(max(mine**2 - 2 * shared * mine * other + other**2, 0.0))

    difference = ours - theirs
    effect = 1.0 if clusters is None else _design_effect(pairs, clusters)
    widened = math.sqrt(effect)
    return PairedDifference(
        episodes=count,
        gained=gained,
        lost=lost,
        low=max(difference - widened * reach(ours - our_low, their_high - theirs), -1.0),
        high=min(difference + widened * reach(our_high - ours, theirs - their_low), 1.0),
        p_value=_mcnemar(gained, lost),
        design_effect=effect,
    )


def _design_effect(pairs: Sequence[tuple[bool, bool]], clusters: Sequence[Hashable]) -> float:
    """Variance of the mean difference with sums over clusters, over that of single episodes."""
    differences = [int(ours) - int(theirs) for ours, theirs in pairs]
    mean = sum(differences) / len(differences)
    sums = _cluster_sums(differences, mean, clusters)
    single = sum((difference - mean) ** 2 for difference in differences)
    return max(1.0, sum(total**2 for total in sums) / single) if single else 1.0


def _cluster_sums(
    values: Sequence[float], mean: float, clusters: Sequence[Hashable]
) -> list[float]:
    """Return each cluster's sum of what its values are off the mean."""
    sums: dict[Hashable, float] = defaultdict(float)
    for cluster, value in zip(clusters, values, strict=True):
        sums[cluster] += value - mean
    return list(sums.values())


def wilson_95(solved: int, episodes: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a share."""
    share, z = solved / episodes, _NORMAL_95**2 / episodes
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(z * (share * (1 - share) + z / 4)) / (1 + z)
    # Rounding may put an end a hair inside the share.
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if not margins:
        return 0.0
    product = float(both * neither - gained * lost)
    if product > 0:
        # Newcombe's correction of a small sample's overstated agreement.
        product = max(product - (both + gained + lost + neither) / 2, 0.0)
    return product / math.sqrt(margins)


def _mcnemar(gained: int, lost: int) -> float:
    """Two-sided: how often fair coins would differ at least as much."""
    flips = gained + lost
    tail = sum(math.comb(flips, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2.0 * tail / math.ldexp(1.0, flips))

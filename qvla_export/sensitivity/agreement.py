"""How well estimated sensitivities agree with exact ones, and how much time they save."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from qvla_export.policies.base import Policy
from qvla_export.policies.layers import layer_shapes, traced_layers
from qvla_export.quantizer.moments import Moments
from qvla_export.sensitivity.estimators.base import ChannelWidth, Question, Work
from qvla_export.sensitivity.estimators.exact import ExactEstimator
from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.artifacts import read_json, require_fields, write_json
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.observation import Observation

# Of a check: about how much CPU time it may take, and pairs that say what one takes.
_CHECK_CPU_S = 60.0
TIMED_PAIRS = 6
# More do not move the rank correlation.
_MOST_PAIRS = 500


@dataclass(frozen=True)
class Agreement:
    """Estimated against exact sensitivities on sampled (channel, width) pairs."""

    # Spearman rank correlation over all pairs, and over the pairs of each width.
    spearman: float
    spearman_by_width: dict[str, float]
    # Observations of the exact measurement.
    samples: int
    # Wall-clock seconds of one exact pair on these observations, of all pairs (extrapolated), and
    # of all of them to first order on as many observations.
    exact_pair_seconds: float
    exact_all_seconds: float
    first_order_seconds: float
    policy_digest: str
    sensitivities_digest: str
    # The pairs: layer, channel, bits, estimated, exact.
    pairs: list[tuple[str, int, int, float, float]]
    # That drew the pairs.
    seed: int = 0

    def __repr__(self) -> str:
        return (
            f"<Agreement: Spearman {self.spearman:.4f} on {len(self.pairs):,} pairs, "
            f"{self.samples} observations, sensitivities {self.sensitivities_digest[:8]}>"
        )

    @property
    def time_ratio(self) -> float:
        """Return the first-order time as a share of the exact time of all channels and widths."""
        return self.first_order_seconds / self.exact_all_seconds

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        write_json(path, {**asdict(self), "time_ratio": self.time_ratio})

    @staticmethod
    def load(path: Path) -> "Agreement":
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        value = read_json(path, "agreement")
        fields = Agreement.__dataclass_fields__
        if not isinstance(value, dict):
            raise ArtifactError(f"{path} is no agreement of sensitivities; make it anew")
        require_fields(value, fields, f"agreement {path}")
        pairs = [
            (str(p[0]), int(p[1]), int(p[2]), float(p[3]), float(p[4])) for p in value["pairs"]
        ]
        return Agreement(**{**{name: value[name] for name in fields}, "pairs": pairs})


def compare_with_exact(
    sensitivities: Sensitivities,
    policy: Policy,
    observations: Sequence[Observation],
    pairs: int = 500,
    seed: int = 0,
    moments: Moments | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Agreement:
    """Measure a random sample of (channel, width) pairs exactly and compare.

    Args:
        sensitivities: of this policy.
        policy: the float policy.
        observations: for the exact side and both timings; ideally those of `sensitivities`.
        pairs: size of the sample, drawn without replacement from all channels and widths.
        seed: of the sample.
        moments: those that the sensitivities' codes were made from, where their quantizer needs
            them.
        on_progress: called with (runs done, runs in all).

    Raises:
        QvlaError: fewer than three pairs or no observations.
    """
    if pairs < 3 or not observations:
        raise QvlaError(f"need 3 pairs and 1 observation, got {pairs} and {len(observations)}")
    shapes = layer_shapes(traced_layers(policy))
    total = len(sensitivities.widths) * sum(channels for channels, _ in shapes.values())
    sample = _sample(sensitivities, min(pairs, total), seed)
    started = time.perf_counter()
    question = _question(sensitivities, policy, observations, moments)
    exact = ExactEstimator().of_pairs(question, sample, Work(on_progress=on_progress))
    pair_seconds = (time.perf_counter() - started) / len(sample)
    estimated = np.array([float(sensitivities.at(p.layer, p.bits)[p.channel]) for p in sample])
    return Agreement(
        spearman=rank_correlation(estimated, exact),
        spearman_by_width=by_width(sample, estimated, exact),
        samples=len(observations),
        seed=seed,
        exact_pair_seconds=pair_seconds,
        exact_all_seconds=pair_seconds * total,
        first_order_seconds=_first_order_seconds(sensitivities, question),
        policy_digest=policy.digest,
        sensitivities_digest=sensitivities.digest,
        pairs=[
            (p.layer, p.channel, p.bits, float(e), float(x))
            for p, e, x in zip(sample, estimated, exact, strict=True)
        ],
    )


def pairs_in_a_minute(
    sensitivities: Sensitivities,
    policy: Policy,
    observations: Sequence[Observation],
    seed: int = 0,
    moments: Moments | None = None,
) -> int:
    """Return how many pairs take about a minute of one core: 3 to 500, after a few of them.

    The calling thread's CPU time counts, so that a busy machine compares no fewer pairs.

    Args:
        sensitivities: of this policy.
        policy: the float policy.
        observations: for the exact side.
        seed: draws the pairs that are timed.
        moments: see `compare_with_exact`.
    """
    question = _question(sensitivities, policy, observations, moments)
    sample = _sample(sensitivities, TIMED_PAIRS, seed)
    started = time.thread_time()
    ExactEstimator().of_pairs(question, sample, Work())
    pair_cpu_s = (time.thread_time() - started) / len(sample)
    return pairs_of_a_minute(pair_cpu_s)


def pairs_of_a_minute(pair_cpu_s: float) -> int:
    """Return how many pairs of so many CPU seconds are compared where no number is asked for."""
    return int(min(_MOST_PAIRS, max(3, _CHECK_CPU_S / max(pair_cpu_s, 1e-6))))


def _sample(sensitivities: Sensitivities, count: int, seed: int) -> list[ChannelWidth]:
    """Draw (channel, width) pairs, all equally likely, none twice."""
    names = list(sensitivities.values)
    sizes = np.array([sensitivities.values[name].size for name in names])
    ends = np.cumsum(sizes)
    drawn = np.random.default_rng(seed).choice(int(ends[-1]), count, replace=False)
    sample = []
    # Sorted, so that runs of one layer follow each other.
    for index in np.sort(drawn).tolist():
        which = int(np.searchsorted(ends, index, side="right"))
        name = names[which]
        within = index - int(ends[which] - sizes[which])
        row, channel = divmod(within, sensitivities.values[name].shape[1])
        sample.append(ChannelWidth(name, channel, sensitivities.widths[row]))
    return sample


def _question(
    sensitivities: Sensitivities,
    policy: Policy,
    observations: Sequence[Observation],
    moments: Moments | None,
) -> Question:
    """Return what the sensitivities answer, to be measured exactly."""
    digest, quantizer = sensitivities.calibration_digest, sensitivities.quantizer
    return Question(policy, observations, digest, quantizer, moments=moments)


def _first_order_seconds(sensitivities: Sensitivities, question: Question) -> float:
    """Time the first-order measurement on one batch, scaled to all observations."""
    batch = question.observations[: question.batch_size]
    settings = FirstOrder(
        quantizer=question.quantizer,
        widths=sensitivities.widths,
        probes=sensitivities.probes or None,
        batch_size=question.batch_size,
        moments=question.moments,
    )
    started = time.perf_counter()
    measure_first_order(question.policy, batch, question.calibration_digest, settings)
    return (time.perf_counter() - started) * len(question.observations) / len(batch)


def by_width(
    sample: Sequence[ChannelWidth], estimated: NDArray[np.float64], exact: NDArray[np.float64]
) -> dict[str, float]:
    """Return the rank correlation within each width that has at least three pairs."""
    bits = np.array([p.bits for p in sample])
    return {
        str(b): rank_correlation(estimated[bits == b], exact[bits == b])
        for b in sorted(set(bits.tolist()))
        if (bits == b).sum() >= 3
    }


def rank_correlation(estimated: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    """Return the rank correlation; 0 where one side is constant and has no ranks."""
    if np.ptp(estimated) == 0 or np.ptp(exact) == 0:
        return 0.0
    return float(spearmanr(estimated, exact).statistic)

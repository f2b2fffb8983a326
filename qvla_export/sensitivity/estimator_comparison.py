"""The noun `EstimatorComparison`: estimators side by side on one sample of channels and widths."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qvla_export.measurement.peak_memory import peak_memory
from qvla_export.measurement.sharded_sums import OnProgress
from qvla_export.policies.layers import layer_shapes, traced_layers
from qvla_export.sensitivity.agreement import by_width, rank_correlation
from qvla_export.sensitivity.estimators.base import ChannelWidth, Estimator, Question, Work
from qvla_export.sensitivity.estimators.sampling import stratified_pairs
from qvla_export.sensitivity.official_timing import official_proxies
from qvla_export.shared.artifacts import read_json, require_fields, versions, write_json
from qvla_export.shared.errors import ArtifactError, QvlaError

_FORMAT = "qvla-estimators-1"
EXACT = "exact"
# Written beside the times, for whoever reads the file.
_RATIOS = ("ratio", "cpu_ratio")


@dataclass(frozen=True)
class EstimatorScore:
    """How well one estimator ranks the pairs, and what it takes."""

    name: str
    method: str
    settings: Mapping[str, Any]
    observations: int
    # Spearman rank correlation with exact, over all pairs and over those of each width.
    spearman: float
    spearman_by_width: Mapping[str, float]
    # Wall-clock seconds of what was run.
    seconds: float
    # Wall-clock seconds of all channels and widths: the same, or `scaled` from the pairs.
    whole_seconds: float
    scaled: bool
    # By which resident memory rose at its peak; None where the system does not tell.
    peak_bytes: int | None
    # Of each pair.
    values: Sequence[float] = field(repr=False)


@dataclass(frozen=True)
class OfficialTime:
    """An estimator beside the official procedure's structure, in one run on the same samples."""

    estimator: str
    observations: int
    # Wall-clock seconds of the official structure for all layers.
    official_seconds: float
    # Of the estimator for all channels and widths: before, amid and after the former.
    estimator_seconds: Sequence[float]
    # The same in seconds of this process's CPU time, which other work on the machine hardly moves.
    official_cpu_seconds: float
    estimator_cpu_seconds: Sequence[float]

    @property
    def ratio(self) -> float:
        """Return how many times longer the official structure takes than the estimator's median."""
        return self.official_seconds / statistics.median(self.estimator_seconds)

    @property
    def cpu_ratio(self) -> float:
        """Return the same ratio of CPU times."""
        return self.official_cpu_seconds / statistics.median(self.estimator_cpu_seconds)


@dataclass(frozen=True)
class EstimatorComparison:
    """Estimators on the same (channel, width) pairs, exact ones first."""

    # Digests, seed, quantizer, options; a file of another question is made anew. On disk: "asked".
    question: Mapping[str, Any]
    # Layer, channel, bits.
    pairs: Sequence[tuple[str, int, int]]
    # Of the policy, all channels at all widths.
    pairs_in_all: int
    figures: Sequence[EstimatorScore] = ()
    official: OfficialTime | None = None
    made_with: Mapping[str, str] = field(default_factory=versions)

    def __repr__(self) -> str:
        names = ", ".join(score.name for score in self.figures) or "no estimators yet"
        return (
            f"<EstimatorComparison: {names} on {len(self.pairs):,} of {self.pairs_in_all:,} pairs, "
            f"policy {str(self.question.get('policy_digest'))[:8]}>"
        )

    def of(self, name: str) -> EstimatorScore | None:
        """Return the figures of an estimator, if it is in."""
        return next((found for found in self.figures if found.name == name), None)

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        value = asdict(self)
        value = {"format": _FORMAT, "asked": value.pop("question"), **value}
        if self.official is not None:
            value["official"] |= {k: getattr(self.official, k) for k in _RATIOS}
        write_json(path, value)

    @staticmethod
    def load(path: Path) -> "EstimatorComparison":
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged or of another kind.
        """
        value = read_json(path, "comparison of estimators")
        stored = {"question": "asked"}
        fields = [stored.get(name, name) for name in EstimatorComparison.__dataclass_fields__]
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise ArtifactError(f"{path} is no comparison of estimators; make it anew")
        require_fields(value, fields, f"comparison {path}")
        try:
            official = value["official"]
            if official is not None:
                official = OfficialTime(**{k: v for k, v in official.items() if k not in _RATIOS})
            return EstimatorComparison(
                question=value["asked"],
                pairs=[(str(p[0]), int(p[1]), int(p[2])) for p in value["pairs"]],
                pairs_in_all=int(value["pairs_in_all"]),
                figures=tuple(EstimatorScore(**figures) for figures in value["figures"]),
                official=official,
                made_with=value["made_with"],
            )
        except (TypeError, IndexError, ValueError, AttributeError) as error:
            raise ArtifactError(f"comparison {path} is damaged: {error}; make it anew") from error


def new_comparison(
    question: Question, pairs: int, seed: int, more: Mapping[str, Any] | None = None
) -> EstimatorComparison:
    """Draw the pairs of a comparison.

    Args:
        question: of all estimators.
        pairs: at least so many, of every layer at every width.
        seed: of the drawing.
        more: what else must be equal for a file to go on from; JSON.
    """
    shapes = layer_shapes(traced_layers(question.policy))
    drawn = stratified_pairs(shapes, question.widths, pairs, seed)
    identity = {
        "policy_digest": question.policy.digest,
        "calibration_digest": question.calibration_digest,
        "observations": len(question.observations),
        "quantizer": question.quantizer.to_json(),
        "widths": list(question.widths),
        "pairs": pairs,
        "seed": seed,
        **(more or {}),
    }
    whole = len(question.widths) * sum(channels for channels, _ in shapes.values())
    return EstimatorComparison(identity, [(p.layer, p.channel, p.bits) for p in drawn], whole)


def add_estimator(
    comparison: EstimatorComparison,
    name: str,
    estimator: Estimator,
    question: Question,
    on_progress: OnProgress | None = None,
) -> EstimatorComparison:
    """Return the comparison with one more estimator in it.

    Args:
        comparison: has "exact" first.
        name: of the estimator.
        estimator: to be measured.
        question: as the comparison was made for; cumulative estimators may see other observations.
        on_progress: called with (work done, work in all).

    Raises:
        QvlaError: another estimator comes before the exact one.
    """
    exact = comparison.of(EXACT)
    if exact is None and name != EXACT:
        raise QvlaError(f"estimators are compared with exact values; measure those before {name}")
    pairs = [ChannelWidth(*pair) for pair in comparison.pairs]
    started = time.perf_counter()
    with peak_memory() as memory:
        values = estimator.of_pairs(question, pairs, Work(on_progress=on_progress))
    seconds = time.perf_counter() - started
    truth = values if exact is None else np.array(exact.values)
    # Of those that are not in the sample, so many cost a pass each.
    share, left = estimator.exact_share, comparison.pairs_in_all - len(pairs)
    each = seconds if exact is None or share == 1 else exact.seconds
    figures = EstimatorScore(
        name=name,
        method=estimator.method,
        settings=dict(estimator.settings),
        observations=len(question.observations),
        spearman=rank_correlation(values, truth),
        spearman_by_width=by_width(pairs, values, truth),
        seconds=seconds,
        whole_seconds=seconds + share * left * each / len(pairs),
        scaled=share > 0 and left > 0,
        peak_bytes=memory.extra_bytes,
        values=values.tolist(),
    )
    return replace(comparison, figures=(*comparison.figures, figures))


def time_official(
    question: Question, name: str, estimator: Estimator, on_progress: OnProgress | None = None
) -> OfficialTime:
    """Time the official procedure's structure, with the estimator before, amid and after it.

    So whatever else the machine does meets both.
    """

    def ours() -> tuple[float, float]:
        return _seconds(lambda: estimator.table(question))

    layers = list(traced_layers(question.policy))
    done = 0

    def tell(layer: int, _: int) -> None:
        if on_progress is not None:
            on_progress(done + layer, len(layers))

    times, official = [ours()], []
    # Every second layer, and then the others: each half is like the whole.
    for half in (layers[::2], layers[1::2]):
        official.append(_seconds(functools.partial(official_proxies, question, half, tell)))
        done += len(half)
        times.append(ours())
    return OfficialTime(
        estimator=name,
        observations=len(question.observations),
        official_seconds=sum(wall for wall, _ in official),
        estimator_seconds=[wall for wall, _ in times],
        official_cpu_seconds=sum(cpu for _, cpu in official),
        estimator_cpu_seconds=[cpu for _, cpu in times],
    )


def _seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Return wall-clock and CPU seconds."""
    started, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - started, time.process_time() - used

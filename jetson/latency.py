"""The nouns `LatencyProfile` and `LatencyComparison`: raw samples first, figures from them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jetson.board import BoardState
from qvla_export.artifacts import read_json, require_fields, write_json
from qvla_export.errors import ArtifactError, QvlaError

_FORMAT = "qvla.latency/1"
_RESAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class LatencyProfile:
    """Every measured action of one policy, by stage, and what it was measured on.

    Raises:
        ArtifactError: stages differ in length, or a sample is not a finite time.
    """

    name: str
    # Stage -> milliseconds of each action in the order taken; "total" spans them all.
    # float64 [n]
    samples_ms: Mapping[str, NDArray[np.float64]]
    # Actions taken and dropped before the samples.
    warmup: int
    # The very first action; it is among the warm-up ones if there are any.
    first_action_ms: float
    # From starting to load the policy until it could act; None where nobody measured it.
    cold_start_ms: float | None
    # "in-process": the server's handler was called; "http": over a real connection.
    transport: str
    bundle_digest: str
    target: str
    versions: Mapping[str, str]
    board_before: BoardState
    board_after: BoardState
    # How the engine ran, e.g. "1 threads, packed"; empty where nobody said.
    conditions: str = ""

    def __post_init__(self) -> None:
        arrays = {
            stage: np.asarray(values, np.float64) for stage, values in self.samples_ms.items()
        }
        lengths = {values.shape for values in arrays.values()}
        if "total" not in arrays or len(lengths) != 1 or not arrays["total"].size:
            raise ArtifactError(
                f"a latency profile needs equally many samples of 'total' and every stage, "
                f"got { ({stage: values.shape for stage, values in arrays.items()}) }"
            )
        bad = [s for s, values in arrays.items() if not (values >= 0).all() or values.max() > 1e12]
        if bad:
            raise ArtifactError(f"latency samples must be finite times >= 0 ms, not so in {bad}")
        object.__setattr__(self, "samples_ms", MappingProxyType(arrays))

    def percentile_ms(self, percent: float, stage: str = "total") -> float:
        """Return a percentile of a stage's samples, linearly interpolated.

        Raises:
            QvlaError: the profile has no such stage.
        """
        if stage not in self.samples_ms:
            raise QvlaError(
                f"profile {self.name!r} has no stage {stage!r}: {list(self.samples_ms)}"
            )
        return float(np.percentile(self.samples_ms[stage], percent))

    def summary_ms(self) -> dict[str, dict[str, float]]:
        """Return p50, p90, p99 and max of every stage."""
        percents = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
        return {
            stage: {name: self.percentile_ms(percent, stage) for name, percent in percents.items()}
            for stage in self.samples_ms
        }

    def missed(self, budget_ms: float) -> float:
        """Return the share of actions that took longer than a budget."""
        return float(np.mean(self.samples_ms["total"] > budget_ms))

    def to_json(self) -> dict[str, Any]:
        """Return the profile as JSON values; the summary is for readers, samples are the truth."""
        # Six decimals are the clock's nanoseconds.
        rounded = {k: np.round(v, 6).tolist() for k, v in self.samples_ms.items()}
        return {
            "name": self.name,
            "summary_ms": self.summary_ms(),
            "warmup": self.warmup,
            "first_action_ms": self.first_action_ms,
            "cold_start_ms": self.cold_start_ms,
            "transport": self.transport,
            "bundle_digest": self.bundle_digest,
            "target": self.target,
            "conditions": self.conditions,
            "versions": dict(self.versions),
            "board_before": self.board_before.to_json(),
            "board_after": self.board_after.to_json(),
            "samples_ms": rounded,
        }

    @classmethod
    def from_json(cls, value: Any) -> "LatencyProfile":
        """Read what `to_json` wrote; the summary is computed, not believed.

        Raises:
            ArtifactError: a field is missing or of the wrong kind.
        """
        plain = (
            "name", "warmup", "first_action_ms", "cold_start_ms",
            "transport", "bundle_digest", "target", "conditions", "versions",
        )  # fmt: skip
        if not isinstance(value, dict):
            raise ArtifactError(f"a latency profile must be an object, got {value!r:.100}")
        require_fields(value, [*plain, "samples_ms", "board_before", "board_after"], "profile")
        try:
            samples = {str(k): np.asarray(v, np.float64) for k, v in value["samples_ms"].items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ArtifactError(f"latency samples must be lists of numbers: {error}") from None
        return cls(
            samples_ms=samples,
            board_before=BoardState.from_json(value["board_before"]),
            board_after=BoardState.from_json(value["board_after"]),
            **{name: value[name] for name in plain},
        )


@dataclass(frozen=True)
class LatencyRatio:
    """Median of a policy over the median of the baseline: below 1 is faster."""

    name: str
    baseline: str
    stage: str
    ratio: float
    # Bootstrap interval over the rounds.
    low: float
    high: float
    confidence: float = _CONFIDENCE


@dataclass(frozen=True)
class LatencyComparison:
    """Profiles taken sample by sample in one run; the first is the baseline."""

    profiles: tuple[LatencyProfile, ...]
    # Of every other profile, for "total" and for "engine" where it was measured.
    ratios: tuple[LatencyRatio, ...]

    def save(self, path: Path) -> None:
        """Write `latency.json` whole or not at all."""
        write_json(
            path,
            {
                "format": _FORMAT,
                "ratios": [asdict(ratio) for ratio in self.ratios],
                "profiles": [profile.to_json() for profile in self.profiles],
            },
        )

    @classmethod
    def load(cls, path: Path) -> "LatencyComparison":
        """Read `latency.json`; the ratios are computed anew from the samples.

        Raises:
            ArtifactError: the file is missing, damaged or of another format.
        """
        value = read_json(path, "latency profile")
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise ArtifactError(f"{path} is not a latency profile of format {_FORMAT!r}")
        profiles = value.get("profiles")
        if not isinstance(profiles, list) or not profiles:
            raise ArtifactError(f"{path} holds no profiles; measure anew with `qvla profile`")
        try:
            return compare_profiles([LatencyProfile.from_json(item) for item in profiles])
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None


def compare_profiles(profiles: list[LatencyProfile]) -> LatencyComparison:
    """Return the profiles with every other one's ratio to the first."""
    baseline, *others = profiles
    ratios = [
        ratio_of_medians(profile, baseline, stage)
        for profile in others
        for stage in ("total", "engine")
        if _comparable(profile, baseline, stage)
    ]
    return LatencyComparison(tuple(profiles), tuple(ratios))


def ratio_of_medians(
    profile: LatencyProfile, baseline: LatencyProfile, stage: str = "total", seed: int = 0
) -> LatencyRatio:
    """Return the ratio of two medians with a 95 % percentile-bootstrap interval.

    Profiles of one interleaved run are resampled by round, so that noise both saw at the same
    moment cancels; profiles of different lengths are resampled independently.
    """
    ours, theirs = profile.samples_ms[stage], baseline.samples_ms[stage]
    generator = np.random.default_rng(seed)
    rounds = generator.integers(0, ours.size, (_RESAMPLES, ours.size))
    their_rounds = rounds
    if theirs.size != ours.size:
        their_rounds = generator.integers(0, theirs.size, (_RESAMPLES, theirs.size))
    resampled = np.median(ours[rounds], axis=1) / np.median(theirs[their_rounds], axis=1)
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    ratio = float(np.median(ours) / np.median(theirs))
    return LatencyRatio(profile.name, baseline.name, stage, ratio, float(low), float(high))


def _comparable(profile: LatencyProfile, baseline: LatencyProfile, stage: str) -> bool:
    # A ratio to a stage that took no measurable time says nothing.
    return all(stage in p.samples_ms and p.samples_ms[stage].min() > 0 for p in (profile, baseline))

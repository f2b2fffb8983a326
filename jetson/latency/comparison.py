"""The noun `LatencyComparison`: what was measured in one run, policies action by action in turn."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engines.layer_times import LayerTimes
from jetson.latency.cold_start import ColdStart
from jetson.latency.profile import REMEDY, LatencyProfile
from qvla_export.shared.artifacts import read_json, write_json
from qvla_export.shared.bootstrap import Interval, ratio_of_medians
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.latency_statistics import LATENCY_FORMAT, Deadline


@dataclass(frozen=True)
class LatencyRatio:
    """Median of a policy over the median of the baseline: below 1 is faster."""

    name: str
    baseline: str
    span: str
    # The ratio with its bootstrap interval; see `qvla_export.shared.bootstrap`.
    interval: Interval

    def to_json(self) -> dict[str, Any]:
        """Return all fields; on disk the span is called a stage."""
        value, low, high = self.interval.value, self.interval.low, self.interval.high
        return {
            "name": self.name,
            "baseline": self.baseline,
            "stage": self.span,
            "ratio": value,
            "low": low,
            "high": high,
            "confidence": self.interval.confidence,
        }


@dataclass(frozen=True)
class LatencyComparison:
    """Profiles taken sample by sample in one run; the first is the baseline."""

    profiles: tuple[LatencyProfile, ...]
    # Of every other profile, for "total" and for "engine" where it was measured.
    ratios: tuple[LatencyRatio, ...]
    # Until when actions were wanted, where that was said.
    deadline: Deadline | None = None
    # Profile's name -> times of its layers, taken in passes of their own.
    layers: Mapping[str, LayerTimes] = field(default_factory=dict)
    # Profile's name -> starts of new processes.
    cold_starts: Mapping[str, tuple[ColdStart, ...]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write `latency.json` whole or not at all."""
        write_json(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return what `latency.json` holds."""
        deadline = self.deadline
        profiles = [profile.to_json() for profile in self.profiles]
        if deadline is not None:
            for profile, shown in zip(self.profiles, profiles, strict=True):
                misses = deadline.misses(profile.samples_ms["total"])
                shown["misses"] = {**asdict(misses), "share": misses.share}
        return {
            "format": LATENCY_FORMAT,
            "deadline": None if deadline is None else {**asdict(deadline), "ms": deadline.ms},
            "ratios": [ratio.to_json() for ratio in self.ratios],
            "profiles": profiles,
            "layers": {name: times.to_json() for name, times in self.layers.items()},
            "cold_starts": {
                name: [asdict(start) for start in starts]
                for name, starts in self.cold_starts.items()
            },
        }

    @classmethod
    def load(cls, path: Path) -> "LatencyComparison":
        """Read `latency.json`; the ratios are computed anew from the samples.

        Raises:
            ArtifactError: the file is missing, damaged or of another format.
        """
        return cls.from_json(read_json(path, "latency profile"), str(path))

    @classmethod
    def from_json(cls, value: Any, path: str) -> "LatencyComparison":
        """Read what `to_json` wrote, from a file of that name; see `load`."""
        found = value.get("format") if isinstance(value, dict) else None
        if found != LATENCY_FORMAT:
            raise ArtifactError(
                f"{path} must be a latency profile of format {LATENCY_FORMAT!r}, it has "
                f"{found!r:.60}; {REMEDY}"
            )
        profiles = value.get("profiles")
        if not isinstance(profiles, list) or not profiles:
            raise ArtifactError(f"{path} holds no profiles; {REMEDY}")
        try:
            compared = compare_profiles(
                [LatencyProfile.from_json(item) for item in profiles],
                _deadline(value.get("deadline")),
            )
            return replace(
                compared,
                layers={
                    name: LayerTimes.from_json(times)
                    for name, times in _by_profile(value, "layers").items()
                },
                cold_starts={
                    name: tuple(ColdStart.from_json(start) for start in starts)
                    for name, starts in _by_profile(value, "cold_starts").items()
                },
            )
        except TypeError as error:  # a number where a list must be
            raise ArtifactError(f"{path} is damaged ({error}); {REMEDY}") from None
        except QvlaError as error:
            raise ArtifactError(f"{path}: {error}") from None


def compare_profiles(
    profiles: Sequence[LatencyProfile], deadline: Deadline | None = None
) -> LatencyComparison:
    """Return the profiles of one interleaved run with every other one's ratio to the first.

    Raises:
        ArtifactError: two share a name, or they have differently many samples.
    """
    baseline, *others = profiles
    names = [profile.name for profile in profiles]
    counts = {len(profile.started_ms) for profile in profiles}
    if len({*names}) != len(names) or len(counts) != 1:
        raise ArtifactError(
            f"profiles of one run need names of their own and equally many samples, got {names} "
            f"of {sorted(counts)}; {REMEDY}"
        )
    ratios = [
        LatencyRatio(other.name, baseline.name, span, interval)
        for other in others
        for span in ("total", "engine")
        if _comparable(other, baseline, span)
        for interval in [ratio_of_medians(other.samples_ms[span], baseline.samples_ms[span], True)]
    ]
    return LatencyComparison(tuple(profiles), tuple(ratios), deadline)


def _by_profile(value: Mapping[str, Any], field_name: str) -> dict[str, Any]:
    found = value.get(field_name, {})
    if not isinstance(found, dict):
        raise ArtifactError(f"{field_name!r} must be an object by profile; {REMEDY}")
    return found


def _deadline(value: Any) -> Deadline | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ArtifactError(f"a deadline must be an object, got {value!r:.60}; {REMEDY}")
    rate_hz, execute = value.get("rate_hz"), value.get("execute")
    if not isinstance(rate_hz, (int, float)) or not isinstance(execute, int):
        raise ArtifactError(
            f"a deadline needs numbers rate_hz and execute, got {rate_hz!r:.60} and "
            f"{execute!r:.60}; {REMEDY}"
        )
    return Deadline(rate_hz, execute)


def _comparable(profile: LatencyProfile, baseline: LatencyProfile, span: str) -> bool:
    # A ratio to a span that took no measurable time says nothing.
    return all(span in p.samples_ms and p.samples_ms[span].min() > 0 for p in (profile, baseline))

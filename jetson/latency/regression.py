"""The noun `LatencyChange`: whether one profile is slower than another, and how sure that is."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jetson.board import BoardState
from jetson.latency.comparison import LatencyComparison
from jetson.latency.profile import LatencyProfile
from qvla_export.shared.bootstrap import QuantileChange, compare_quantiles, needed_samples
from qvla_export.shared.errors import QvlaError

PERCENTS = (50.0, 90.0, 99.0)
_FORMAT = "qvla.latency-change/1"
# What makes two machines different ones, and what may differ between two runs on one.
_MACHINE = ("model", "module", "cpu_model", "cores")
_STATE = (
    "power_mode",
    "clocks_locked",
    "governors",
    "l4t",
    "jetpack",
    "tensorrt",
    "kernel",
)


class LatencyRegression(QvlaError):
    """A policy got slower by more than is tolerated."""


@dataclass(frozen=True)
class LatencyChange:
    """Two profiles against each other, quantile by quantile of every span that both have."""

    base: str
    new: str
    # Whether both were measured in the rounds of one run.
    paired: bool
    # Slower by this share is tolerated: 0.05.
    tolerance: float
    # Span -> one change a percentile of `PERCENTS`.
    spans: Mapping[str, tuple[QuantileChange, ...]]
    # What else differs, for a reader to judge.
    notes: tuple[str, ...]

    @property
    def slower(self) -> tuple[QuantileChange, ...]:
        """Quantiles of the total whose interval lies wholly beyond the tolerance."""
        return tuple(c for c in self.spans["total"] if self.verdict(c) == "slower")

    def verdict(self, change: QuantileChange) -> str:
        """Return "slower", "faster", "same" or why it cannot be said.

        Slower is an interval wholly above 1 + tolerance, faster one wholly below 1 / (1 +
        tolerance), same one between the two; everything else is undecided.
        """
        if change.ratio is None:
            few = change.difference_ms is None
            return f"needs {needed_samples(change.percent)} samples" if few else "no time"
        above, below = 1 + self.tolerance, 1 / (1 + self.tolerance)
        if change.ratio.low > above:
            return "slower"
        if change.ratio.high < below:
            return "faster"
        return "same" if below <= change.ratio.low and change.ratio.high <= above else "undecided"

    def require_not_slower(self) -> None:
        """Raise if the total is slower.

        Raises:
            LatencyRegression: naming the quantiles and by how much.
        """
        if not self.slower:
            return
        found = [
            f"p{c.percent:g} {c.base_ms:.2f} -> {c.new_ms:.2f} ms, ratio {c.ratio.value:.3f} "
            f"[{c.ratio.low:.3f}, {c.ratio.high:.3f}]"
            for c in self.slower
            if c.ratio is not None
        ]
        raise LatencyRegression(
            f"{self.new} is slower than {self.base} by more than {self.tolerance:.0%}: "
            f"{'; '.join(found)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        spans = {
            span: [{**asdict(c), "verdict": self.verdict(c)} for c in changes]
            for span, changes in self.spans.items()
        }
        return {
            "format": _FORMAT,
            "base": self.base,
            "new": self.new,
            "paired": self.paired,
            "tolerance": self.tolerance,
            "slower": bool(self.slower),
            "notes": list(self.notes),
            "stages": spans,
        }


def compare_latency(
    base: LatencyProfile,
    new: LatencyProfile,
    paired: bool = False,
    tolerance: float = 0.05,
    seed: int = 0,
    allow_different: bool = False,
) -> LatencyChange:
    """Compare two profiles.

    Intervals come from what varies within each run. A machine that is slower in one run than in
    another looks like a slower policy, unless both were measured in one run, in pairs.

    Args:
        base: what was.
        new: what is.
        paired: whether both come from the rounds of one run; pairs are then drawn together.
        tolerance: share by which the new one may be slower.
        seed: of the bootstrap.
        allow_different: compare even what was measured on different machines, targets or
            transports, whose difference says nothing about the policy.

    Raises:
        QvlaError: that is the case and not allowed, or the tolerance is negative.
    """
    if not 0 <= tolerance < 100:
        raise QvlaError(f"the tolerance is a share such as 0.05, got {tolerance}")
    different = _differences(_identity(base), _identity(new))
    if different and not allow_different:
        raise QvlaError(
            f"{base.name!r} and {new.name!r} cannot be compared, they differ in "
            f"{'; '.join(different)}; measure both in the same place, or say --allow-different"
        )
    shared = [span for span in base.samples_ms if span in new.samples_ms]
    spans = {
        span: compare_quantiles(base.samples_ms[span], new.samples_ms[span], PERCENTS, paired, seed)
        for span in shared
    }
    return LatencyChange(
        base.name, new.name, paired, tolerance, spans, (*different, *_notes(base, new))
    )


def pair_profiles(
    run: LatencyComparison, base: str | None, new: str | None
) -> list[tuple[LatencyProfile, LatencyProfile]]:
    """Return pairs of one interleaved run: the named ones, or every other with the first.

    Raises:
        QvlaError: the run has no profile of a name, or nothing to compare.
    """
    first = run.profiles[0] if base is None else _find(run, base)
    others = [p for p in run.profiles if p is not first] if new is None else [_find(run, new)]
    if not others or first in others:
        raise QvlaError(
            f"one run holds only {[p.name for p in run.profiles]}: give two files, or a run of "
            "several policies and which to compare: --base NAME --new NAME"
        )
    return [(first, other) for other in others]


def match_profiles(
    before: LatencyComparison, after: LatencyComparison, base: str | None, new: str | None
) -> list[tuple[LatencyProfile, LatencyProfile]]:
    """Return pairs of two runs: the named ones, those of equal names, or the only two.

    Raises:
        QvlaError: a run has no profile of that name, or it is not clear which belong together.
    """
    if base is not None or new is not None:
        older = _find(before, base or str(new))
        return [(older, _find(after, new or str(base)))]
    known = {profile.name: profile for profile in after.profiles}
    pairs = [(p, known[p.name]) for p in before.profiles if p.name in known]
    if not pairs and len(before.profiles) == len(after.profiles) == 1:
        pairs = [(before.profiles[0], after.profiles[0])]
    if not pairs:
        raise QvlaError(
            f"no profile has the same name in both runs ({[p.name for p in before.profiles]} and "
            f"{list(known)}); say which to compare: --base NAME --new NAME"
        )
    return pairs


def _find(run: LatencyComparison, name: str) -> LatencyProfile:
    found = [profile for profile in run.profiles if profile.name == name]
    if not found:
        raise QvlaError(
            f"no profile is called {name!r}; there are {[p.name for p in run.profiles]}"
        )
    return found[0]


def _identity(profile: LatencyProfile) -> dict[str, Any]:
    board = profile.board_before
    machine = {f"machine ({name})": getattr(board, name) for name in _MACHINE}
    return {**machine, "target": profile.target, "transport": profile.transport}


def _notes(base: LatencyProfile, new: LatencyProfile) -> Iterable[str]:
    yield from _differences(_conditions(base), _conditions(new))
    for profile in (base, new):
        for slowed in _slowdowns(profile.board_before, profile.board_after):
            yield f"{profile.name}: the board was slowed down, {slowed}"
    alone = [
        f"{span} of {ours.name}"
        for ours, other in ((base, new), (new, base))
        for span in ours.samples_ms
        if span not in other.samples_ms
    ]
    if alone:
        yield f"spans that only one has: {', '.join(alone)}"


def _conditions(profile: LatencyProfile) -> dict[str, Any]:
    state = {name: getattr(profile.board_before, name) for name in _STATE}
    versions = {f"version of {name}": found for name, found in profile.versions.items()}
    return {"conditions": profile.conditions, **state, **versions}


def _slowdowns(before: BoardState, after: BoardState) -> Iterable[str]:
    if names := sorted({*before.throttling, *after.throttling}):
        yield f"{', '.join(names)} active"
    for name, count in after.throttle_counts.items():
        if count > before.throttle_counts.get(name, count):
            yield f"{name} {count - before.throttle_counts[name]} times"


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys((*ours, *theirs))
    return [
        f"{name}: {ours.get(name)!r} then {theirs.get(name)!r}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]

"""The noun `Recommendation`: the smallest setting under every bound, and what it saves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qvla_export.pipeline.recommend.bounds import Bound
from qvla_export.pipeline.recommend.next_commands import NextCommand
from qvla_export.pipeline.recommend.open_loop import OpenLoopError
from qvla_export.shared.action_space import ActionSpace

_FORMAT = "qvla.recommendation/1"


@dataclass(frozen=True)
class ActionTime:
    """Milliseconds of one action."""

    ms: float
    # Measured medians are of this machine; a prediction names its power mode and range.
    measured: bool
    where: str
    # Between which it is predicted; equal to `ms` where it was measured.
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class Candidate:
    """A setting that may be recommended, or the float bundle beside them."""

    setting: str
    is_float: bool
    bundle_digest: str
    # Graphs and weights as shipped.
    bundle_bytes: int
    error: OpenLoopError
    # None where it was neither measured nor can be predicted.
    time: ActionTime | None = None


@dataclass(frozen=True)
class Recommendation:
    """Which setting to take, by which bounds, and everything it was chosen from."""

    target: str
    calibration_digest: str
    space: ActionSpace
    # The float policy's in torch: what it errs by itself.
    float_error: OpenLoopError
    bounds: tuple[Bound, ...]
    # In the order in which they were asked for.
    candidates: tuple[Candidate, ...]
    # The chosen candidate's; None where none fits, or a bound is missing.
    setting: str | None
    # In sentences: the choice and what it saves, or why there is none and what to try.
    sentences: tuple[str, ...]
    # What a reader should doubt, in sentences.
    warnings: tuple[str, ...]
    commands: tuple[NextCommand, ...]
    # Dimension -> whose actions -> chunk -> step: see `pipeline.recommend.traces`.
    traces: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<Recommendation: {self.setting or 'none'} of {len(self.candidates)} settings>"

    @property
    def chosen(self) -> Candidate | None:
        """Return the recommended candidate."""
        return next((c for c in self.candidates if c.setting == self.setting), None)

    @property
    def float_candidate(self) -> Candidate | None:
        """Return the float bundle, if it is among the settings."""
        return next((c for c in self.candidates if c.is_float), None)

    def to_json(self, with_traces: bool = True) -> dict[str, Any]:
        """Return what `recommendation.json` holds, or what a terminal is told: all but traces."""
        traces = {"traces": dict(self.traces)} if with_traces else {}
        return {
            "format": _FORMAT,
            "target": self.target,
            "calibration_digest": self.calibration_digest,
            "setting": self.setting,
            "sentences": list(self.sentences),
            "warnings": list(self.warnings),
            "commands": [asdict(command) for command in self.commands],
            "action": {**asdict(self.space), "units": self._units()},
            "float_policy": self.float_error.to_json(),
            "bounds": [{**asdict(bound), "text": bound.text} for bound in self.bounds],
            "settings": [self._candidate_json(c) for c in self.candidates],
            **traces,
        }

    def _units(self) -> list[dict[str, Any]]:
        """Return each number's unit, and what one unit of the action is in it."""
        units = [self.space.unit(group) for group in self.space.groups]
        return [{"unit": unit, "scale": scale} for unit, scale in units]

    def _candidate_json(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "setting": candidate.setting,
            "is_float": candidate.is_float,
            "bundle_digest": candidate.bundle_digest,
            "bundle_bytes": candidate.bundle_bytes,
            "open_loop": candidate.error.to_json(),
            "time": None if candidate.time is None else asdict(candidate.time),
            "added": {b.group: b.added(candidate.error) for b in self.bounds},
            "exceeds": [b.group for b in exceeded(candidate, self.bounds)],
        }


def choose(candidates: Sequence[Candidate], bounds: Sequence[Bound]) -> Candidate | None:
    """Return the smallest quantized candidate that stays under every bound; None if none does.

    Nothing is chosen where a bound is missing: it would hold for anything.
    """
    fitting = [c for c in candidates if not c.is_float and not exceeded(c, bounds)]
    return min(fitting, key=lambda c: (c.bundle_bytes, c.setting), default=None)


def exceeded(candidate: Candidate, bounds: Sequence[Bound]) -> tuple[Bound, ...]:
    """Return the bounds that a candidate does not stay under; missing ones among them."""
    return tuple(bound for bound in bounds if not bound.allows(candidate.error))

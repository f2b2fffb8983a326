"""The noun `LatencyProfile`: raw samples first, figures from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jetson.board import BoardState
from qvla_export.shared.artifacts import require_fields
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.latency_statistics import summary

REMEDY = "measure anew with `qvla profile`"
_TEXTS = ("name", "transport", "bundle_digest", "target", "conditions")
# No action of ours takes eleven days.
_LONGEST_MS = 1e9


@dataclass(frozen=True)
class LatencyProfile:
    """Every measured action of one policy, by span, and what it was measured on.

    Raises:
        ArtifactError: spans differ in length, or a sample is not a finite time.
    """

    name: str
    # Span (see `shared.clock`) -> milliseconds of each action in the order taken; "total"
    # covers them all. float64 [n]
    samples_ms: Mapping[str, NDArray[np.float64]]
    # When each action began, after the first one of them did. float64 [n]
    started_ms: NDArray[np.float64]
    # Actions taken and dropped before the samples.
    warmup: int
    # The very first action; it is among the warm-up ones if there are any.
    first_action_ms: float
    # From starting to open the policy until its engine was loaded; None where nobody measured it.
    # In a fresh process the import of the runtime is part of it.
    load_ms: float | None
    # "in-process": the server's handler was called; "http": over a real connection.
    transport: str
    bundle_digest: str
    target: str
    # Actions in a chunk.
    horizon: int
    versions: Mapping[str, str]
    board_before: BoardState
    board_after: BoardState
    # How the engine ran, e.g. "1 threads, packed"; empty where nobody said.
    conditions: str = ""

    def __post_init__(self) -> None:
        arrays = {span: np.asarray(values, np.float64) for span, values in self.samples_ms.items()}
        started_ms = np.asarray(self.started_ms, np.float64)
        shapes = {values.shape for values in arrays.values()} | {started_ms.shape}
        if "total" not in arrays or len(shapes) != 1 or started_ms.ndim != 1 or not started_ms.size:
            raise ArtifactError(
                f"a latency profile needs equally many samples of 'total' and every span, and "
                f"as many starts, got { ({s: v.shape for s, v in arrays.items()}) } and "
                f"{started_ms.shape}"
            )
        times = {**arrays, "started": started_ms}
        bad = [s for s, v in times.items() if not (v >= 0).all() or v.max() > _LONGEST_MS]
        if bad:
            raise ArtifactError(f"latency samples must be finite times >= 0 ms, not so in {bad}")
        object.__setattr__(self, "samples_ms", MappingProxyType(arrays))
        object.__setattr__(self, "started_ms", started_ms)

    @property
    def cold_start_ms(self) -> float | None:
        """From starting to open the policy to its first action; None where that is not known."""
        return None if self.load_ms is None else self.load_ms + self.first_action_ms

    def percentile_ms(self, percent: float, span: str = "total") -> float:
        """Return a percentile of a span's samples, linearly interpolated.

        Also where the samples do not support it; `qvla_export.shared.latency_statistics` tells.

        Raises:
            QvlaError: the profile has no such span.
        """
        if span not in self.samples_ms:
            raise QvlaError(f"profile {self.name!r} has no span {span!r}: {list(self.samples_ms)}")
        return float(np.percentile(self.samples_ms[span], percent))

    def summary_ms(self) -> dict[str, dict[str, float | None]]:
        """Return percentiles, max and jitter of every span; None is not supported by n."""
        return {span: summary(samples) for span, samples in self.samples_ms.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the profile as JSON values; the summary is for readers, samples are the truth."""
        # Six decimals are the clock's nanoseconds.
        rounded = {k: np.round(v, 6).tolist() for k, v in self.samples_ms.items()}
        return {
            "name": self.name,
            "summary_ms": self.summary_ms(),
            "warmup": self.warmup,
            "first_action_ms": self.first_action_ms,
            "load_ms": self.load_ms,
            "cold_start_ms": self.cold_start_ms,
            "transport": self.transport,
            "bundle_digest": self.bundle_digest,
            "target": self.target,
            "horizon": self.horizon,
            "conditions": self.conditions,
            "versions": dict(self.versions),
            "board_before": self.board_before.to_json(),
            "board_after": self.board_after.to_json(),
            "started_ms": np.round(self.started_ms, 6).tolist(),
            "samples_ms": rounded,
        }

    @classmethod
    def from_json(cls, value: Any) -> "LatencyProfile":
        """Read what `to_json` wrote; the summary is computed, not believed.

        Raises:
            ArtifactError: a field is missing or of the wrong kind.
        """
        plain = (*_TEXTS, "warmup", "first_action_ms", "load_ms", "horizon", "versions")
        if not isinstance(value, dict):
            raise ArtifactError(f"a latency profile must be an object, got {value!r:.100}")
        boards = ("board_before", "board_after")
        require_fields(value, [*plain, "samples_ms", "started_ms", *boards], "profile")
        _require_kinds(value)
        try:
            samples = {str(k): np.asarray(v, np.float64) for k, v in value["samples_ms"].items()}
            started_ms = np.asarray(value["started_ms"], np.float64)
        except (AttributeError, TypeError, ValueError) as error:
            raise ArtifactError(f"latency samples must be lists of numbers: {error}") from None
        return cls(
            samples_ms=samples,
            started_ms=started_ms,
            board_before=BoardState.from_json(value["board_before"]),
            board_after=BoardState.from_json(value["board_after"]),
            **{name: value[name] for name in plain},
        )


def _require_kinds(value: Mapping[str, Any]) -> None:
    if bad := [name for name in _TEXTS if not isinstance(value[name], str)]:
        raise ArtifactError(f"fields {bad} of a latency profile must be texts; {REMEDY}")
    times = [value["first_action_ms"], *([] if value["load_ms"] is None else [value["load_ms"]])]
    counts = [value["warmup"], value["horizon"]]
    if not all(type(t) in (int, float) and math.isfinite(t) and t >= 0 for t in times) or not all(
        type(count) is int and count >= 0 for count in counts
    ):
        raise ArtifactError(
            "a latency profile needs times first_action_ms and load_ms and counts warmup and "
            f"horizon, all >= 0, got {times} and {counts}; {REMEDY}"
        )
    if not isinstance(value["versions"], dict):
        raise ArtifactError(f"'versions' of a latency profile must be an object; {REMEDY}")

"""The noun `LoadResult`: what a server did under a load, and how far that can be believed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jetson.board import BoardState
from jetson.clients.load import LoadPlan, LoadTimes
from qvla_export.shared.artifacts import versions, write_json
from qvla_export.shared.latency_statistics import Deadline, Misses, percentile, summary

_FORMAT = "qvla.load/1"
# Of the latency at p99; a client that adds more measures itself.
_LAG_SHARE = 0.1
# Of one core: Python runs one thread at a time, so that beyond this its threads wait for another.
_CPU_SHARE = 0.8
# Of the asked rate; less than that was not held.
_HELD_SHARE = 0.99
_MOST_REASONS = 20
_REASON_CHARACTERS = 300


@dataclass(frozen=True)
class LoadResult:
    """Times of every request of one run, and the figures that follow from them."""

    # Protocol and address.
    protocol: str
    server: str
    plan: LoadPlan
    times: LoadTimes
    # Milliseconds after a request was due that its reply is useless; None where nobody said.
    deadline_ms: float | None = None
    # What was sent: "random, 224 x 224" or the name of a recording.
    observations: str = ""
    # The generator's machine; the server's own is at its /metrics.
    board: BoardState | None = None

    @property
    def never_sent(self) -> NDArray[np.bool_]:
        """Which requests were given up because every connection was busy for too long."""
        return np.isnan(self.times.sent_s)

    @property
    def has_reply(self) -> NDArray[np.bool_]:
        """Which requests got actions."""
        answered = ~self.never_sent
        answered[list(self.times.failures)] = False
        return answered

    @property
    def corrected_ms(self) -> NDArray[np.float64]:
        """From when a request was due to its reply; of one never sent, to when it was given up.

        Failed ones are not among them: what got no reply has no latency.
        """
        times = self.times
        return 1000 * (times.done_s - times.due_s)[self.has_reply | self.never_sent]

    @property
    def service_ms(self) -> NDArray[np.float64]:
        """From sending to the reply, which hides what waited behind it."""
        return 1000 * (self.times.done_s - self.times.sent_s)[self.has_reply]

    @property
    def waited_ms(self) -> NDArray[np.float64]:
        """How long sent requests waited for a connection after they were due: the server's time."""
        return 1000 * np.maximum(self.times.free_s - self.times.due_s, 0)[~self.never_sent]

    @property
    def lag_ms(self) -> NDArray[np.float64]:
        """How much later than it could have the generator sent: its own time, not the server's."""
        times = self.times
        could_s = np.maximum(times.free_s, times.due_s)
        return 1000 * (times.sent_s - could_s)[~self.never_sent]

    @property
    def achieved_hz(self) -> float:
        """Answered requests a second, from the start to the last reply."""
        return int(self.has_reply.sum()) / self._span_s

    @property
    def misses(self) -> Misses | None:
        """Requests without actions at their deadline, failed and never sent ones among them."""
        if self.deadline_ms is None:
            return None
        latency_ms = 1000 * (self.times.done_s - self.times.due_s)
        latency_ms[~self.has_reply] = np.inf
        return Deadline(1000 / self.deadline_ms).misses(latency_ms)

    @property
    def reasons(self) -> Mapping[str, int]:
        """Why requests failed -> how many did, most frequent first."""
        failures = self.times.failures.values()
        counted = Counter(reason[:_REASON_CHARACTERS] for reason in failures)
        found = dict(counted.most_common(_MOST_REASONS))
        if others := counted.total() - sum(found.values()):
            found["other reasons"] = others
        return found

    @property
    def cpu_share(self) -> float:
        """CPU time of the generator over the run's; 1 is a whole core."""
        return self.times.cpu_s / self._span_s

    @property
    def generator_kept_up(self) -> bool:
        """Whether the client's own delays are small beside the latency that it reports."""
        return not self._generator_notes()

    def _generator_notes(self) -> list[str]:
        notes = []
        remedy = "measure from another or an idle machine, or ask for less"
        if self.corrected_ms.size and self.lag_ms.size:
            lag_ms, whole_ms = _tail(self.lag_ms), _tail(self.corrected_ms)
            if lag_ms > _LAG_SHARE * whole_ms:
                notes.append(
                    f"the generator did not keep up: p99 of its own delay is {lag_ms:.2f} ms of "
                    f"the {whole_ms:.2f} ms reported; {remedy}"
                )
        if self.cpu_share > _CPU_SHARE:
            notes.append(
                f"the generator did not keep up: it computed {self.cpu_share:.0%} of the time, "
                f"and its threads waited for one another; {remedy}"
            )
        return notes

    def notes(self) -> list[str]:
        """Return what a reader of the figures must know."""
        notes = self._generator_notes()
        waited = int((self.waited_ms > 0).sum())
        if self.achieved_hz < _HELD_SHARE * self._due_hz:
            notes.append(f"the rate was not held: {self.achieved_hz:.4g} of {self._due_hz:.4g} Hz")
        if waited or self.never_sent.any():
            notes.append(
                f"{waited} requests waited for one of {self.plan.clients} busy connections, "
                f"{int(self.never_sent.sum())} were never sent; their time counts from when they "
                "were due (of those never sent to when they were given up, at least)"
            )
        return notes

    @property
    def _span_s(self) -> float:
        return max(self.plan.duration_s, float(self.times.done_s.max()))

    @property
    def _due_hz(self) -> float:
        return len(self.times.due_s) / self.plan.duration_s

    def to_json(self) -> dict[str, Any]:
        """Return figures and every request's times, milliseconds."""
        times = self.times
        misses = self.misses
        return {
            "format": _FORMAT,
            "protocol": self.protocol,
            "server": self.server,
            "observations": self.observations,
            "plan": asdict(self.plan),
            "requests": len(times.due_s),
            "answered": int(self.has_reply.sum()),
            "never_sent": int(self.never_sent.sum()),
            "failures": dict(self.reasons),
            "asked_hz": self._due_hz,
            "achieved_hz": self.achieved_hz,
            "deadline_ms": self.deadline_ms,
            "misses": None if misses is None else {**asdict(misses), "share": misses.share},
            "corrected_ms": _figures(self.corrected_ms),
            "service_ms": _figures(self.service_ms),
            "waited_ms": _figures(self.waited_ms),
            "generator_lag_ms": _figures(self.lag_ms),
            "generator_cpu_share": self.cpu_share,
            "generator_kept_up": self.generator_kept_up,
            "notes": self.notes(),
            "versions": versions(),
            "generator_board": None if self.board is None else self.board.to_json(),
            "samples_ms": {
                name: _rounded_ms(getattr(times, f"{name}_s"))
                for name in ("due", "free", "sent", "done")
            },
        }

    def save(self, path: Path) -> None:
        """Write the result as JSON, whole or not at all."""
        write_json(path, self.to_json())


def _tail(samples_ms: NDArray[np.float64]) -> float:
    p99 = percentile(samples_ms, 99)
    return float(samples_ms.max()) if p99 is None else p99


def _figures(samples_ms: NDArray[np.float64]) -> dict[str, float | None] | None:
    return summary(samples_ms) if samples_ms.size else None


def _rounded_ms(seconds: NDArray[np.float64]) -> list[float | None]:
    # Four decimals are tenths of a microsecond; JSON has no NaN.
    return [None if np.isnan(value) else round(float(value) * 1000, 4) for value in seconds]

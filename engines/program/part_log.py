"""The noun `PartLog`: how often and how long each run of a program ran for one action."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from qvla_export.shared.clock import SpanClock
from qvla_export.shared.program import PartRuns


class PartLog:
    """Counts and times the calls of one action as they happen."""

    def __init__(self) -> None:
        self._clock = SpanClock()
        self._calls: Counter[str] = Counter()

    @contextmanager
    def call(self, run: PartRuns) -> Iterator[None]:
        """Count the block as one call of a part of a run, and add its duration to the run's."""
        with self._clock.span(run.name):
            yield
        self._calls[run.name] += 1

    @property
    def part_ms(self) -> Mapping[str, float]:
        """Milliseconds by run, all its repetitions together, in order."""
        return self._clock.timing_ms

    @property
    def part_calls(self) -> Mapping[str, int]:
        """Calls of parts by run: repetitions times parts, of what really ran."""
        return dict(self._calls)

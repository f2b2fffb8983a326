"""The one latency clock: named stages on the monotonic clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageClock:
    """Measures named stages of one action in milliseconds."""

    def __init__(self) -> None:
        self.timing_ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's duration to stage `name`."""
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            elapsed_ms = (time.perf_counter_ns() - start) / 1e6
            self.timing_ms[name] = self.timing_ms.get(name, 0.0) + elapsed_ms

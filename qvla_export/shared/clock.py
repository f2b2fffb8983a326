"""The one latency clock: named stages on the monotonic clock.

Stage names, the same in a policy's timing, the server's metrics and headers, recordings, profiles
and the report: "capture", "decode", "preprocess", "engine", "postprocess", "encode", "transport",
and "total", which spans them. A dot names a part of a stage: "engine.decoder" is what the stage
graph "decoder" took of "engine", "engine.host_to_device" the copy before it. Parts need not sum to
their whole; whoever sums stages sums `whole_stages`.
"""

import time
from collections.abc import Iterable, Iterator
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


def part(stage: str, name: str) -> str:
    """Return the name of a part of a stage."""
    return f"{stage}.{name}"


def whole_stages(names: Iterable[str]) -> list[str]:
    """Return the stages in order without the parts of others and without "total"."""
    found = list(names)
    return [n for n in found if n != "total" and n.rpartition(".")[0] not in found]

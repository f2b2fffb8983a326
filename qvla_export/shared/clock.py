"""The one latency clock: named spans on the monotonic clock.

Names of spans, the same in a policy's timing, the server's metrics and headers, recordings,
profiles and the report: "capture", "decode", "preprocess", "engine", "postprocess", "encode",
"transport", and "total", which covers them all. A dot names a span inside another:
"engine.decoder" is what the bundle's part "decoder" took of "engine", "engine.host_to_device" the
copy before it. Inner spans need not sum to the outer one; whoever sums spans sums `whole_spans`.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class SpanClock:
    """Measures named spans of one action in milliseconds."""

    def __init__(self) -> None:
        self.timing_ms: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the block's duration to span `name`."""
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            elapsed_ms = (time.perf_counter_ns() - start) / 1e6
            self.timing_ms[name] = self.timing_ms.get(name, 0.0) + elapsed_ms


def inner_span(span: str, name: str) -> str:
    """Return the name of a span inside another."""
    return f"{span}.{name}"


def whole_spans(names: Iterable[str]) -> list[str]:
    """Return the spans in order, without those inside others and without "total"."""
    present = list(names)
    return [n for n in present if n != "total" and n.rpartition(".")[0] not in present]

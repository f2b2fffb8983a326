"""What Prometheus reads at `/metrics`: latency by span, errors, misses, drops, the board.

    qvla_stage_seconds{stage}    histogram by span; "total" covers the others
    qvla_actions_total           requests answered with actions
    qvla_errors_total{kind}      requests answered with a reason instead
    qvla_deadline_misses_total   actions that took longer than the deadline, if there is one
    qvla_drops_total{what}       "request": turned away unread; "recording": not recorded
    qvla_recording_up            1 while the recording is written, 0 once it failed
    qvla_loop_*_total            counts of a control loop (`qvla run`)
    qvla_board_*                 the board, as sampled by `BoardWatch`
    process_*                    memory, CPU time and open files of the process

Counting an action costs microseconds; everything else is done when somebody reads.
"""

import numbers
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from jetson.board import BoardState
from jetson.errors import Forbidden, RateLimited, ServerBusy, Unauthorized
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.request_observer import ServedRequest

# Seconds. Fine where robots live: control periods of 200 Hz to 5 Hz are among them.
SPAN_BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.0333, 0.05, 0.1, 0.2, 0.5, 1, 2.5,
)  # fmt: skip
# Requests that nobody decoded: there was no room, or no right, for them.
_TURNED_AWAY = (ServerBusy, RateLimited, Unauthorized, Forbidden)
# Spans are named by policies; a policy that invents a name an action must not fill the memory.
_MAX_SPANS = 64


class Metrics:
    """Counts what is served; an `Observer` with a registry of its own."""

    def __init__(
        self,
        contract: PolicyContract,
        board: Callable[[], BoardState],
        deadline_ms: float | None = None,
        recording_drops: Callable[[], int] = lambda: 0,
        counters: Callable[[], Mapping[str, int]] | None = None,
        recording_up: Callable[[], bool] | None = None,
    ) -> None:
        """Register everything.

        Args:
            contract: of the policy that is served.
            board: returns the newest sample.
            deadline_ms: what an action may take; None counts no misses.
            recording_drops: returns how much was not recorded so far.
            counters: returns the counts of a control loop, where there is one.
            recording_up: returns whether the recording is written, where there is one.
        """
        self._registry = CollectorRegistry()
        self._deadline_ms = deadline_ms
        self._span_s = Histogram(
            "qvla_stage_seconds",
            "Time of one span of one action",
            ["stage"],
            buckets=SPAN_BUCKETS_S,
            registry=self._registry,
        )
        self._spans: dict[str, Histogram] = {}
        self._spans_lock = threading.Lock()
        self._actions = self._counter("qvla_actions", "Requests answered with actions")
        self._errors = self._counter("qvla_errors", "Requests without an action", ["kind"])
        self._misses = self._counter("qvla_deadline_misses", "Actions later than the deadline")
        self._drops = self._counter("qvla_drops", "What was turned away or not kept", ["what"])
        for what in ("request", "recording"):
            self._drops.labels(what)
        Info("qvla_policy", "What is served", registry=self._registry).info(
            {
                "bundle_digest": contract.bundle_digest,
                "target": contract.target,
                "unnorm_key": contract.unnorm_key,
            }
        )
        self._recording_drops = recording_drops
        self._recording_dropped = 0
        self._registry.register(_BoardCollector(board))
        if counters is not None:
            self._registry.register(_LoopCollector(counters))
        if recording_up is not None:
            up = Gauge("qvla_recording_up", "Whether events are recorded", registry=self._registry)
            up.set_function(lambda: float(recording_up()))
        ProcessCollector(registry=self._registry)

    def on_request(self, served: ServedRequest) -> None:
        """Count one request."""
        if served.error is not None:
            self._errors.labels(type(served.error).__name__).inc()
            if isinstance(served.error, _TURNED_AWAY):
                self._drops.labels("request").inc()
            return
        self._actions.inc()
        for span, ms in served.timing_ms.items():
            histogram = self._spans.get(span) or self._span(span)
            if histogram is not None:
                histogram.observe(ms / 1000.0)
        if self._deadline_ms is not None and served.timing_ms["total"] > self._deadline_ms:
            self._misses.inc()

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """Return the page that Prometheus reads and its content type, as its client asks."""
        dropped = self._recording_drops()
        self._drops.labels("recording").inc(max(0, dropped - self._recording_dropped))
        self._recording_dropped = max(dropped, self._recording_dropped)
        encode, content_type = choose_encoder(accept or "")
        return encode(self._registry), content_type

    def _counter(self, name: str, said: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, said, labels, registry=self._registry)

    def _span(self, name: str) -> Histogram | None:
        with self._spans_lock:
            if name not in self._spans and len(self._spans) >= _MAX_SPANS:
                return None
            # Looking a label up costs more than counting it.
            return self._spans.setdefault(name, self._span_s.labels(name))


def board_figures(state: BoardState) -> dict[str, dict[tuple[str, ...], float]]:
    """Return every number a board state holds: name -> where in it -> value.

    Numbers in lists are told apart by their index, those in maps by their key, those in records
    by the record's own name. What is None or text is no figure.
    """
    figures: dict[str, dict[tuple[str, ...], float]] = {}
    for name, value in state.to_json().items():
        found = dict(_numbers(value, ()))
        if found:
            figures[name] = found
    return figures


def _numbers(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(value, numbers.Real):
        yield place, float(value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, (*place, str(key)))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            named = part.get("name", index) if isinstance(part, Mapping) else index
            yield from _numbers(part, (*place, str(named)))


class _BoardCollector:
    """Turns the newest board sample into gauges when somebody reads them."""

    def __init__(self, board: Callable[[], BoardState]) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        for name, figures in board_figures(self._board()).items():
            labels = [] if () in figures else ["of"]
            gauge = GaugeMetricFamily(f"qvla_board_{name}", f"Board state: {name}", labels=labels)
            for place, value in figures.items():
                gauge.add_metric(["/".join(place)] if labels else [], value)
            yield gauge


class _LoopCollector:
    """Turns the counts of a control loop into counters when somebody reads them."""

    def __init__(self, counters: Callable[[], Mapping[str, int]]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        for name, count in self._counters().items():
            said = f"Control loop: {name.replace('_', ' ')}"
            yield CounterMetricFamily(f"qvla_loop_{name}", said, value=count)

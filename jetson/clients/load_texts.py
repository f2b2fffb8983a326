"""What `qvla load` says of a server, for a terminal."""

from collections.abc import Iterator
from pathlib import Path

from jetson.clients.load_result import LoadResult
from qvla_export.shared.latency_statistics import PERCENTS, percentile_text
from qvla_export.shared.tables.text_table import TextTable


def load_texts(result: LoadResult, path: Path | None) -> Iterator[str | TextTable]:
    """Yield the times of requests, how many were answered, late or failed, and what to know."""
    yield _times(result)
    total, answered = len(result.times.due_s), int(result.has_reply.sum())
    yield (
        f"{answered} of {total} requests answered, {result.achieved_hz:.4g} Hz achieved, "
        f"{result.plan.rate_hz:g} Hz asked ({result.plan.arrivals}, "
        f"{result.plan.clients} connections)"
    )
    misses = result.misses
    if misses is not None:
        yield (
            f"{misses.count} ({misses.share:.2%}) missed the deadline of {result.deadline_ms:g} "
            f"ms, at most {misses.longest_run} in a row"
        )
    for reason, count in result.reasons.items():
        yield f"failed: {count} x {reason}"
    yield from result.notes()
    yield f"load: {total} requests" + ("" if path is None else f" -> {path}")


def _times(result: LoadResult) -> TextTable:
    columns = ("time", *(f"p{percent:g}" for percent in PERCENTS), "max")
    title = f"{result.protocol} at {result.server}, {result.observations}, ms"
    rows = {
        "due to reply (corrected)": result.corrected_ms,
        "sent to reply (service)": result.service_ms,
        "waited for a connection": result.waited_ms,
        "the generator's own delay": result.lag_ms,
    }
    return TextTable(columns, title=title).with_rows(
        (
            name,
            *(percentile_text(samples, percent) for percent in PERCENTS),
            f"{samples.max():.2f}",
        )
        for name, samples in rows.items()
        if samples.size
    )

"""What `qvla soak` says, for a terminal."""

from collections.abc import Iterator

from qvla_export.pipeline.soak.report import SoakReport, Tallies, percentiles_ms
from qvla_export.pipeline.soak.tally import Tally
from qvla_export.shared.tables.text_table import TextTable

_WORDS = {True: "held", False: "BROKEN", None: "not judged"}


def soak_texts(report: SoakReport) -> Iterator[str | TextTable]:
    """Yield what became of good clients and attackers, and which promises held."""
    yield _table("good clients", report.good)
    yield _table(f"attackers ({report.attacker})", report.attacks)
    for promise in report.promises:
        yield f"{_WORDS[promise.holds]}: {promise.text} ({promise.figure})"
    yield (
        f"soak: {report.hours:.3f} hours, seed {report.seed}, "
        f"{'all promises held' if report.ok else 'a promise was broken'}"
    )


def _table(title: str, tallies: Tallies) -> TextTable:
    columns = ("phase", "protocol", "sent", "answered", "refused", "wrong", "p50 ms", "p99 ms")
    return TextTable(columns, title=title, words=("protocol",)).with_rows(
        (phase, protocol, *_cells(tally)) for (phase, protocol), tally in tallies.items()
    )


def _cells(tally: Tally) -> tuple[str, ...]:
    times = percentiles_ms(tally)
    return (
        f"{tally.sent:,}",
        f"{tally.answered:,}",
        ", ".join(f"{count:,} {reason}" for reason, count in tally.refused.most_common()),
        ", ".join(f"{count:,} {reason}" for reason, count in tally.wrong.most_common(3)),
        *(("", "") if times is None else (f"{value:.1f}" for value in times)),
    )

"""A comparison as a section of a README; the page has every row whole."""

from collections.abc import Iterator, Sequence

from qvla_export.comparison.bars import bars
from qvla_export.comparison.comparison import FLOAT, Comparison
from qvla_export.comparison.contestants import TABLES, PaperTable, parse_contestant
from qvla_export.comparison.rows import Outcome, Row
from qvla_export.comparison.tables import NONE, success_text

# Tables whose contestants that ran episodes have a line of their own.
_IN_FULL = ("1", "2")
_COLUMNS = (
    "setting",
    "mean bits per channel / weight / stored",
    "layers, MB",
    "action error, RMS",
    "success [Wilson 95 %]",
    "against float, points, paired [95 %]",
    "cumulative deviation",
    "jerk RMS, m/s³; gripper flips",
    "time to quantize, s",
)


def to_markdown(comparison: Comparison) -> str:
    """Return the rows with episodes, the bars, every table in short, the command and versions."""
    return "\n".join(_lines(comparison)) + "\n"


def _lines(comparison: Comparison) -> Iterator[str]:
    yield from _table(_COLUMNS, _full_rows(comparison))
    yield ""
    for bar in bars(comparison):
        yield f"- {bar.requirement}: **{bar.verdict}** ({bar.result})"
    ranks = comparison.ranks
    if ranks is not None:
        yield (
            f"- Fig. 7: {len(ranks.channels)} channels at {ranks.bits} bits, one decision against "
            f"along episodes: Spearman {ranks.spearman:.3f}, {ranks.near_diagonal:.0%} within a "
            "tenth of the ranks of the diagonal"
        )
    yield ""
    short = [row for table in TABLES for row in _short_rows(comparison, table)]
    yield from _table(("table", "settings: action error, RMS (MB; success)"), short)
    yield ""
    versions = ", ".join(f"{name} {version}" for name, version in comparison.made_with.items())
    machine = ", ".join(f"{name} {value}" for name, value in comparison.machine.items())
    yield f"`{comparison.command}` ({machine}; {versions})"


def _full_rows(comparison: Comparison) -> Iterator[Sequence[str]]:
    names = [n for table in TABLES if table.number in _IN_FULL for n in table.contestants]
    by_bits = sorted(dict.fromkeys(names), key=lambda name: -parse_contestant(name).bits)
    for name in by_bits:
        row = comparison.row(name)
        if row is not None and row.episodes:
            yield _full(comparison, row)
    for name, outcomes in comparison.controls.items():
        if outcomes:
            yield (f"{FLOAT}, {name}", *[""] * 3, _success(outcomes), *[""] * 4)


def _full(comparison: Comparison, row: Row) -> Sequence[str]:
    parts = ("bits_per_channel", "bits_per_weight", "stored_bits_per_weight")
    reference = comparison.row(FLOAT)
    paired = None if row.name == FLOAT or reference is None else row.against(reference)
    seconds = row.total_seconds if row.total_cpu_seconds is None else row.total_cpu_seconds
    return (
        f"**{row.name}**" if _recommended(row.name) else row.name,
        " / ".join(f"{row.mean_cost(part):.2f}" for part in parts),
        f"{row.weight_bytes / 1e6:.2f}",
        f"{_error(row.rms)} ± {_error(row.rms_spread)}",
        _success(row.episodes),
        ""
        if paired is None
        else f"{100 * paired.value:+.1f} [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]",
        "" if row.deviation is None else f"{row.deviation:.2g}",
        "" if row.motion is None else f"{row.motion[0]:.3g}; {row.motion[1]:.2f}",
        "" if seconds is None or row.name == FLOAT else f"{seconds:.0f}",
    )


def _recommended(name: str) -> bool:
    contestant = parse_contestant(name)
    return contestant.main and contestant.compensated and not contestant.smoothed


def _short_rows(comparison: Comparison, table: PaperTable) -> Iterator[Sequence[str]]:
    """One row for each nominal width of a table: its contestants with their main figures."""
    found = [row for n in table.contestants if n != FLOAT and (row := comparison.row(n))]
    widths = dict.fromkeys(parse_contestant(row.name).bits for row in found)
    for bits in widths:
        rows = [row for row in found if parse_contestant(row.name).bits == bits]
        title = f"{table.number}, {table.title[0].lower()}{table.title[1:]}, {bits:g} bits"
        yield title, " · ".join(map(_short, rows))


def _short(row: Row) -> str:
    success = "" if row.success is None else f"; {100 * row.success:.1f} %"
    return f"{row.name} {_error(row.rms)} ({row.weight_bytes / 1e6:.2f}{success})"


def _success(outcomes: tuple[Outcome, ...]) -> str:
    share, interval = success_text(outcomes)
    return f"{share} {interval}" if interval else NONE


def _error(rms: float) -> str:
    return f"{rms:.2g}" if rms < 1e-3 else f"{rms:.4f}"


def _table(
    columns: Sequence[str], rows: Iterator[Sequence[str]] | list[Sequence[str]]
) -> list[str]:
    lines = [columns, ["---"] * len(columns), *([_plain(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

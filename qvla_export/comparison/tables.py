"""The comparison's tables: rows of words and numbers, for the page and for markdown alike."""

from qvla_export.comparison.bars import bars
from qvla_export.comparison.comparison import FLOAT, Comparison
from qvla_export.comparison.contestants import PaperTable, parse_contestant
from qvla_export.comparison.paired import wilson_95
from qvla_export.comparison.rows import Outcome, Row
from qvla_export.report.cells import Cell, Table

NONE = "–"
_COLUMNS = (
    "Setting",
    "Mean bits per channel / weight / stored",
    "Layers, bytes",
    "Action error, RMS",
    "Solved episodes",
    "Against float, points",
    "Cumulative deviation",
    "Jerk RMS, m/s³",
    "Time to quantize",
    "Run by",
)


def paper_table(comparison: Comparison, table: PaperTable) -> Table:
    """Return one table, of those of its contestants that were measured."""
    found = [row for name in table.contestants if (row := comparison.row(name)) is not None]
    rows = [_row_cells(comparison, row) for row in found]
    if any(row.episodes for row in found):
        rows += control_rows(comparison)
    return Table(_COLUMNS, tuple(rows))


def all_rows(comparison: Comparison) -> Table:
    """Return everything that was measured, controls last."""
    rows = [_row_cells(comparison, row) for row in comparison.rows]
    return Table(_COLUMNS, (*rows, *control_rows(comparison)))


def control_rows(comparison: Comparison) -> list[tuple[Cell, ...]]:
    """Return the float policy with one input taken away: what success means without it."""
    blank = Cell(NONE)
    return [
        (
            Cell(f"{FLOAT}, {name}", "control"),
            *(blank,) * 3,
            _success(outcomes),
            *(blank,) * 4,
            Cell("onnxruntime"),
        )
        for name, outcomes in comparison.controls.items()
        if outcomes
    ]


def dimensions(comparison: Comparison) -> Table:
    """Return the action error of every action dimension, in the robot's units."""
    count = max((len(row.physical) for row in comparison.rows), default=0)
    rows = tuple(
        (Cell(row.name), *(Cell(f"{value:.3g}", f"{part:.3g} normalized") for value, part in pairs))
        for row in comparison.rows
        for pairs in (list(zip(row.physical, row.normalized, strict=True)),)
    )
    return Table(("Setting", *(f"Dimension {i}" for i in range(count))), rows)


def bar_table(comparison: Comparison) -> Table:
    """Return every bar with what was found."""
    rows = tuple(
        (Cell(bar.requirement), Cell(bar.verdict), Cell(bar.result)) for bar in bars(comparison)
    )
    return Table(("Bar", "", "Found"), rows)


def _row_cells(comparison: Comparison, row: Row) -> tuple[Cell, ...]:
    bits = (row.mean_cost(n) for n in ("bits_per_channel", "bits_per_weight"))
    stored = row.mean_cost("stored_bits_per_weight")
    held_out = sum(seed.held_out for seed in row.seeds)
    return (
        Cell(row.name, row.seeds[0].library or _kind(row.name)),
        Cell(" / ".join(f"{value:.2f}" for value in (*bits, stored))),
        Cell(f"{row.weight_bytes:,.0f}", f"{100 * row.ratio:.1f} % of FP16"),
        Cell(f"{row.rms:.3g}", f"± {row.rms_spread:.1g} over {len(row.seeds)} seeds, n {held_out}"),
        _success(row.episodes),
        _against(comparison, row),
        Cell(NONE if row.deviation is None else f"{row.deviation:.3g}"),
        _motion(row),
        _seconds(row),
        Cell(row.engines),
    )


def _motion(row: Row) -> Cell:
    if row.motion is None:
        return Cell(NONE)
    return Cell(f"{row.motion[0]:.3g}", f"{row.motion[1]:.2f} gripper flips")


def _kind(name: str) -> str:
    contestant = parse_contestant(name)
    if name == FLOAT:
        return "not quantized"
    if contestant.kind == "setting" and contestant.of_run.kind == "uniform":
        return "round to nearest"
    parts = ["planned"]
    parts += ["smoothed"] if contestant.smoothed else []
    parts += [] if contestant.compensated else ["nearest codes"]
    if contestant.observations is not None:
        parts.append(f"{contestant.observations} observations")
    return ", ".join(parts)


def success_text(outcomes: tuple[Outcome, ...]) -> tuple[str, str]:
    """Return the share of solved episodes, and its Wilson interval with their number."""
    if not outcomes:
        return NONE, ""
    solved = sum(outcome.solved for outcome in outcomes)
    low, high = wilson_95(solved, len(outcomes))
    interval = f"[{100 * low:.1f}, {100 * high:.1f}], n {len(outcomes)}"
    return f"{100 * solved / len(outcomes):.1f} %", interval


def _success(outcomes: tuple[Outcome, ...]) -> Cell:
    return Cell(*success_text(outcomes))


def _against(comparison: Comparison, row: Row) -> Cell:
    reference = comparison.row(FLOAT)
    if reference is None or row.name == FLOAT:
        return Cell(NONE)
    paired = row.against(reference)
    if paired is None:
        return Cell(NONE)
    return Cell(
        f"{100 * paired.value:+.1f}",
        f"[{100 * paired.low:+.1f}, {100 * paired.high:+.1f}], +{paired.gained} −{paired.lost} "
        f"episodes, p {paired.p_value:.2g}",
    )


def _seconds(row: Row) -> Cell:
    total = row.total_seconds
    if total is None or row.name == FLOAT:
        return Cell(NONE)
    parts = ", ".join(next(seed.seconds for seed in row.seeds if seed.seconds))
    cpu = row.total_cpu_seconds
    return Cell(f"{total:.0f} s", parts if cpu is None else f"{cpu:.0f} s of CPU; {parts}")

"""What `qvla estimators` says, for a terminal."""

from collections.abc import Iterator
from pathlib import Path

from qvla_export.sensitivity.estimator_comparison import EstimatorComparison, OfficialTime
from qvla_export.shared.tables.text_table import TextTable


def estimator_texts(comparison: EstimatorComparison, path: Path) -> Iterator[str | TextTable]:
    """Yield ranks, times and memory of every estimator, and the official procedure's time."""
    widths = [str(bits) for bits in comparison.question["widths"]]
    by_width = (f"{bits} bits" for bits in widths)
    names = ("estimator", "Spearman", *by_width, "all pairs, s", "peak, MB")
    yield TextTable(names).with_rows(
        (
            row.name,
            f"{row.spearman:.4f}",
            *(_spearman(row.spearman_by_width.get(bits)) for bits in widths),
            f"{row.whole_seconds:.1f}{' (scaled)' if row.scaled else ''}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        )
        for row in comparison.figures
    )
    if comparison.official is not None:
        yield _official_line(comparison.official)
    yield f"{len(comparison.pairs)} pairs of {comparison.pairs_in_all} -> {path}"


def _spearman(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _official_line(official: OfficialTime) -> str:
    ours = ", ".join(f"{seconds:.1f}" for seconds in official.estimator_seconds)
    return (
        f"official structure {official.official_seconds:.1f} s; {official.estimator} before, amid "
        f"and after it {ours} s: {official.ratio:.1f} times less "
        f"({official.cpu_ratio:.1f} in CPU time)"
    )

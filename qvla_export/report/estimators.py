"""How well sensitivities are known: estimators side by side, and standard errors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvla_export.report.cells import NONE, Cell, Table
from qvla_export.report.measured import damage_named, finite, read_object
from qvla_export.sensitivity.sensitivities import Sensitivities


@dataclass(frozen=True)
class EstimatorRow:
    """One estimator on the sampled (channel, width) pairs."""

    name: str
    method: str
    # Rank correlation with exact, of all pairs and the lowest of one width (None: of no width).
    spearman: float
    worst: float | None
    observations: int
    # Of all channels and widths; scaled from the pairs or not.
    seconds: float
    scaled: bool
    # By which resident memory rose at its peak; None where the system did not tell.
    peak_bytes: float | None


@dataclass(frozen=True)
class ComparedEstimators:
    """Estimators on one sample of pairs, and the official procedure's structure in the same run."""

    policy_digest: str
    calibration_digest: str
    pairs: int
    pairs_in_all: int
    figures: tuple[EstimatorRow, ...]
    # Estimator that was timed beside the official structure, how many times longer that takes, and
    # the same of CPU time; None where it was not timed.
    official: tuple[str, float, float] | None


def read_estimators(path: Path) -> ComparedEstimators:
    """Read what `EstimatorComparison` saved, without its import of torch.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    what = "comparison of estimators"
    value = read_object(path, what, ("asked", "pairs", "pairs_in_all", "figures", "official"))
    with damage_named(path, what):
        timed = value["official"]
        return ComparedEstimators(
            policy_digest=str(value["asked"]["policy_digest"]),
            calibration_digest=str(value["asked"]["calibration_digest"]),
            pairs=len(value["pairs"]),
            pairs_in_all=int(value["pairs_in_all"]),
            figures=tuple(_figures(row) for row in value["figures"]),
            official=timed
            and (
                str(timed["estimator"]),
                float(finite(timed["ratio"])),
                float(finite(timed["cpu_ratio"])),
            ),
        )


def estimator_table(compared: ComparedEstimators | None) -> Table:
    """Return ranks against exact measurement, time and memory; no rows where nothing was run."""
    columns = ("Estimator", "Spearman", "Worst width", "All pairs, s", "Peak memory")
    return Table(columns, tuple(_row(row) for row in compared.figures) if compared else ())


def estimator_caption(compared: ComparedEstimators) -> str:
    """Return what the table was measured on."""
    text = (
        f"Rank correlation with exact measurement on {compared.pairs:,} of "
        f"{compared.pairs_in_all:,} (channel, width) pairs, of every layer at every width. Memory: "
        "by how much the process grew."
    )
    if compared.official is None:
        return text
    name, ratio, cpu_ratio = compared.official
    return (
        f"{text} The official procedure's structure, timed in the same run on the same samples, "
        f"takes {ratio:.1f} times as long as {name} ({cpu_ratio:.1f} in CPU time)."
    )


def standard_error_table(measured: Sensitivities) -> Table:
    """Return relative standard errors by width; no rows where they were not recorded."""
    error = measured.standard_error
    columns = ("Standard error of", *(f"{bits} bits" for bits in measured.widths))
    if error is None:
        return Table(columns, ())
    rows = []
    for name, spread in error.by_width.items():
        pairs = zip(spread.error, spread.by_probes, strict=True)
        rows.append((Cell(name), *(_spread(found, probes) for found, probes in pairs)))
    return Table(columns, tuple(rows))


def _figures(row: Mapping[str, Any]) -> EstimatorRow:
    by_width = finite(list(row["spearman_by_width"].values()))
    peak = row["peak_bytes"]
    return EstimatorRow(
        name=str(row["name"]),
        method=str(row["method"]),
        spearman=float(finite(row["spearman"])),
        worst=float(by_width.min()) if by_width.size else None,
        observations=int(finite(row["observations"])),
        seconds=float(finite(row["whole_seconds"])),
        scaled=bool(row["scaled"]),
        peak_bytes=None if peak is None else float(finite(peak)),
    )


def _row(row: EstimatorRow) -> tuple[Cell, ...]:
    return (
        Cell(row.name, f"{row.method}; {row.observations} observations"),
        Cell(f"{row.spearman:.4f}"),
        Cell(NONE if row.worst is None else f"{row.worst:.4f}"),
        Cell(f"{row.seconds:,.1f}", "scaled from the pairs" if row.scaled else ""),
        Cell(NONE if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB"),
    )


def _spread(error: float, by_probes: float) -> Cell:
    share = min(1.0, (by_probes / error) ** 2) if error else 0.0
    return Cell(f"{100 * error:.0f} %", f"probes: {100 * share:.0f} % of the variance")

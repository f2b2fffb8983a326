"""`qvla estimators`: ranks of all estimators against exact measurement, time, memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.cli.options import (
    A_RUN,
    JsonOption,
    PolicyOption,
    PresetOption,
    ProbesOption,
    RunOption,
    SeedOption,
    ShareOption,
    TargetOption,
    UnnormKeyOption,
)
from qvla_export.cli.progress import progress_shown

if TYPE_CHECKING:
    from qvla_export.sensitivity.estimator_comparison import EstimatorComparison, OfficialTime

# Wide enough wherever nobody looks at a terminal.
_TABLE_WIDTH = 132


def estimators(
    run: RunOption,
    policy: PolicyOption,
    target: TargetOption = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file; an interrupted run goes on. Default: estimators.json in the run "
            "folder, where qvla report finds it."
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option(help="(channel, width) pairs, of every layer at every width.")
    ] = 2000,
    observations: Annotated[
        int | None, typer.Option(min=1, help="Of the calibration set, the first; default all.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="Estimator, beside exact; repeat. Default: all."),
    ] = None,
    probes: ProbesOption = 4,
    exact_share: ShareOption = 0.02,
    episodes: Annotated[
        Path | None,
        typer.Option(
            help="Run folder whose calibration set cumulative estimators sum along.",
            callback=A_RUN.require,
        ),
    ] = None,
    official: Annotated[
        bool, typer.Option(help="Time the official procedure's structure as well.")
    ] = True,
    seed: SeedOption = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, of all alike.")] = 1,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare all estimators on one sample of channels: ranks against exact, time, memory."""
    import torch

    from engines.targets import find_target
    from qvla_export.pipeline.estimators import EstimatorRequest, compare_estimators
    from qvla_export.pipeline.policy_source import open_checkpoint
    from qvla_export.pipeline.run_folder import RunFolder
    from qvla_export.sensitivity.estimators.registry import Options

    torch.set_num_threads(threads)
    request = EstimatorRequest(
        run=RunFolder(run),
        policy=open_checkpoint(policy, unnorm_key, preset),
        target=find_target(target),
        options=Options(probes or None, exact_share),
        methods=tuple(methods) if methods else None,
        pairs=pairs,
        observations=observations,
        episodes=episodes,
        official=official,
        seed=seed,
    )
    output = output or request.run.estimators
    with progress_shown() as on_progress:
        comparison = compare_estimators(request, output, on_progress)
    if as_json:
        typer.echo(output.read_text())
        return
    Console(width=_TABLE_WIDTH).print(_table(comparison))
    if comparison.official is not None:
        typer.echo(_official_line(comparison.official))
    typer.echo(f"{len(comparison.pairs)} pairs of {comparison.pairs_in_all} -> {output}")


def _table(comparison: "EstimatorComparison") -> Table:
    widths = [str(bits) for bits in comparison.question["widths"]]
    table = Table()
    names = ["estimator", "Spearman", *(f"{b} bits" for b in widths), "all pairs, s", "peak, MB"]
    for name in names:
        table.add_column(name, justify="left" if name == "estimator" else "right")
    for row in comparison.figures:
        by_width = [row.spearman_by_width.get(bits) for bits in widths]
        table.add_row(
            row.name,
            f"{row.spearman:.4f}",
            *("" if spearman is None else f"{spearman:.4f}" for spearman in by_width),
            f"{row.whole_seconds:.1f}{' (scaled)' if row.scaled else ''}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        )
    return table


def _official_line(official: "OfficialTime") -> str:
    ours = ", ".join(f"{seconds:.1f}" for seconds in official.estimator_seconds)
    return (
        f"official structure {official.official_seconds:.1f} s; {official.estimator} before, amid "
        f"and after it {ours} s: {official.ratio:.1f} times less "
        f"({official.cpu_ratio:.1f} in CPU time)"
    )

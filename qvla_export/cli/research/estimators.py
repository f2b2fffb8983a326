"""`qvla estimators`: ranks of all estimators against exact measurement, time, memory."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.cli.options import (
    A_RUN,
    PolicyOption,
    PresetOption,
    ProbesOption,
    RunOption,
    SeedOption,
    ShareOption,
    TargetOption,
    UnnormKeyOption,
)

if TYPE_CHECKING:
    from qvla_export.sensitivity.estimator_comparison import EstimatorComparison

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
) -> None:
    """Compare all estimators on one sample of channels: ranks against exact, time, memory."""
    import torch

    from engines.targets import find_target
    from qvla_export.pipeline.estimators import Asked, compare
    from qvla_export.pipeline.policy_source import open_checkpoint
    from qvla_export.pipeline.run_folder import RunFolder
    from qvla_export.sensitivity.estimators.registry import Options

    torch.set_num_threads(threads)
    told = Options(probes or None, exact_share)
    loaded = open_checkpoint(policy, unnorm_key, preset)
    asked = Asked(
        RunFolder(run), loaded, find_target(target), told, pairs, observations, episodes, seed
    )
    output = output or asked.run.estimators
    compared = compare(asked, methods, official, output)
    typer.echo(table(compared))
    typer.echo(f"{len(compared.pairs)} pairs of {compared.pairs_in_all} -> {output}")


def table(compared: "EstimatorComparison") -> str:
    """Return the figures for a terminal."""
    widths = [str(bits) for bits in compared.asked["widths"]]
    shown = Table()
    names = ["estimator", "Spearman", *(f"{b} bits" for b in widths), "all pairs, s", "peak, MB"]
    for name in names:
        shown.add_column(name, justify="left" if name == "estimator" else "right")
    for row in compared.figures:
        by_width = [row.spearman_by_width.get(bits) for bits in widths]
        shown.add_row(
            row.name,
            f"{row.spearman:.4f}",
            *("" if found is None else f"{found:.4f}" for found in by_width),
            f"{row.whole_seconds:.1f}{' (scaled)' if row.scaled else ''}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        )
    text = io.StringIO()
    Console(file=text, width=_TABLE_WIDTH).print(shown)
    timed = compared.official
    if timed is not None:
        ours = ", ".join(f"{seconds:.1f}" for seconds in timed.estimator_seconds)
        text.write(
            f"official structure {timed.official_seconds:.1f} s; {timed.estimator} before, amid "
            f"and after it {ours} s: {timed.ratio:.1f} times less "
            f"({timed.cpu_ratio:.1f} in CPU time)"
        )
    return text.getvalue().rstrip()

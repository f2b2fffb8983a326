"""`qvla compare`: our version of the paper's tables and figures, over seeds."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvla_export.cli.options import (
    CountOption,
    DatasetOption,
    EnvironmentOption,
    HeldOutOption,
    JsonOption,
    PolicyOption,
    PresetOption,
    TargetOption,
    TasksOption,
    UnnormKeyOption,
    WorkersOption,
    with_columns,
)
from qvla_export.cli.progress import progress_shown
from qvla_export.pipeline.data_source import USUAL_COLUMNS, ColumnOptions, open_dataset
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.comparison.contestants import Contestant


@with_columns
def compare(
    policy: PolicyOption = Path("checkpoints/reference"),
    run: Annotated[
        Path, typer.Option("--run", help="Folder of a run a seed; an existing one continues.")
    ] = Path("runs/compare"),
    target: TargetOption = "cpu",
    tables: Annotated[
        str | None, typer.Option(help="Of the paper: 1,2,3,4,6,9. Default: all.")
    ] = None,
    contestants: Annotated[
        str | None,
        typer.Option(
            help="Instead of tables: settings, w4@nearest for nearest codes, w8a8@smoothed, w4@16 "
            "from 16 observations, w4-awq for a library's."
        ),
    ] = None,
    episodes_for: Annotated[
        str | None,
        typer.Option(
            help="Those that run episodes, in this order, exported if they can be. Default: main "
            "settings, their nearest codes, GPTQ, round to nearest."
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Each draws a calibration set and runs episodes of its own.")
    ] = "0,1,2",
    episodes: Annotated[
        int, typer.Option(min=0, help="Of each task, contestant and seed; 0 for none.")
    ] = 9,
    along_episodes: Annotated[
        int, typer.Option(min=0, help="Observations of fig. 7, 16 an episode; 0 for none.")
    ] = 128,
    count: CountOption = 64,
    held_out: HeldOutOption = 64,
    environment: EnvironmentOption = Path(".baselines"),
    dataset: DatasetOption = None,
    columns: ColumnOptions = USUAL_COLUMNS,
    tasks: TasksOption = None,
    page_only: Annotated[
        bool, typer.Option(help="Measure nothing, write the pages of what is there.")
    ] = False,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    workers: WorkersOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Compare settings and baselines: error, success, bytes, bits, time; over seeds.

    Writes comparison.json, comparison.html and comparison.md into the folder, and continues what
    an interrupted run began.
    """
    from engines.targets import find_target
    from qvla_export.comparison.comparison import FLOAT
    from qvla_export.comparison.contestants import WITH_EPISODES
    from qvla_export.pipeline.calibrate import chosen_tasks
    from qvla_export.pipeline.compare.compare import compare_contestants, write_pages
    from qvla_export.pipeline.compare.job import ComparisonJob
    from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint

    first = WITH_EPISODES if episodes_for is None else _listed(episodes_for)
    job = ComparisonJob(
        root=run,
        source=PolicySource(str(policy), unnorm_key, preset, threads=1),
        policy=open_checkpoint(policy, unnorm_key, preset),
        target=find_target(target),
        contestants=_contestants(contestants, tables),
        with_episodes=tuple(dict.fromkeys([FLOAT, *first])),
        seeds=_seeds(seeds),
        dataset=open_dataset(dataset, columns) if dataset else None,
        tasks=chosen_tasks(tasks),
        count=count,
        held_out=held_out,
        episodes=episodes,
        environment=environment,
        workers=workers,
        along_episodes=along_episodes,
        command=" ".join(["qvla", *sys.argv[1:]]),
    )
    with progress_shown() as on_progress:
        pages = write_pages(job) if page_only else compare_contestants(job, on_progress)
    files = f"comparison: {pages.json}, {pages.html}, {pages.markdown}"
    typer.echo(pages.json.read_text() if as_json else files)


def _contestants(names: str | None, tables: str | None) -> "tuple[Contestant, ...]":
    from qvla_export.comparison.contestants import table_contestants
    from qvla_export.pipeline.compare.compare import contestants_named

    if names is not None:
        return contestants_named(_listed(names))
    return table_contestants(None if tables is None else tuple(_listed(tables)))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(dict.fromkeys(int(part) for part in _listed(text)))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0:
        raise QvlaError(f"--seeds takes numbers from 0 on, such as 0,1,2, got {text!r}")
    return seeds

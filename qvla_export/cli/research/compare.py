"""`qvla compare`: our version of the paper's tables and figures, over seeds."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from qvla_export.cli.options import (
    CamerasOption,
    CountOption,
    DatasetOption,
    EnvironmentOption,
    HeldOutOption,
    PolicyOption,
    PresetOption,
    StateColumnOption,
    TargetOption,
    TasksOption,
    UnnormKeyOption,
    WorkersOption,
)
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.comparison.comparison import Comparison
    from qvla_export.pipeline.compare.compare import Contest

# Of `Contest.told`: another value of one of these makes other rows.
_SAME = ("target", "seeds", "count", "held_out", "tasks", "episodes_of_a_task_and_seed")


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
    cameras: CamerasOption = None,
    state_column: StateColumnOption = "observation.state",
    tasks: TasksOption = None,
    page_only: Annotated[
        bool, typer.Option(help="Measure nothing, write the pages of what is there.")
    ] = False,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    workers: WorkersOption = 2,
) -> None:
    """Compare settings and baselines: error, success, bytes, bits, time; over seeds.

    Writes comparison.json, comparison.html and comparison.md into the folder, and continues what
    an interrupted run began.
    """
    from engines.targets import find_target
    from qvla_export.comparison.comparison import FLOAT
    from qvla_export.comparison.contestants import WITH_EPISODES, table_contestants
    from qvla_export.pipeline.calibrate import chosen_tasks, open_dataset
    from qvla_export.pipeline.compare.compare import Contest, compare_all, contestants_named
    from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint

    opened = open_checkpoint(policy, unnorm_key, preset)
    named = None if contestants is None else contestants_named(_listed(contestants))
    chosen = named or table_contestants(None if tables is None else tuple(_listed(tables)))
    played = WITH_EPISODES if episodes_for is None else _listed(episodes_for)
    wanted = Contest(
        root=run,
        source=PolicySource(str(policy), unnorm_key, preset, threads=1),
        policy=opened,
        target=find_target(target),
        contestants=chosen,
        with_episodes=tuple(dict.fromkeys([FLOAT, *played])),
        seeds=_seeds(seeds),
        dataset=open_dataset(dataset, cameras, state_column),
        tasks=chosen_tasks(tasks),
        count=count,
        held_out=held_out,
        episodes=episodes,
        environment=environment,
        workers=workers,
        along_episodes=along_episodes,
    )
    compared, new = _begun(wanted)
    if not page_only:
        compared = replace(
            compared, command=new.command, settings=new.settings, made_with=new.made_with
        )
        compared = compare_all(wanted, compared, _say)
    _write_pages(wanted, compared)


def _begun(wanted: "Contest") -> "tuple[Comparison, Comparison]":
    """What an earlier run has measured of the same, if any; and a comparison without rows."""
    from jetson.board import read_board_state
    from qvla_export.comparison.comparison import Comparison
    from qvla_export.pipeline.reuse import kept_artifact

    board = read_board_state()
    told = wanted.told()
    new = Comparison(
        wanted.policy.digest,
        " ".join(["qvla", *sys.argv[1:]]),
        {"cpu_model": str(board.cpu_model), "cores": str(board.cores)},
        told,
    )
    kept = kept_artifact(wanted.output, Comparison.load)
    if kept is None or kept.policy_digest != new.policy_digest:
        return new, new
    same = all(kept.settings.get(name) == told[name] for name in _SAME)
    return (kept if same else new), new


def _write_pages(wanted: "Contest", compared: "Comparison") -> None:
    from qvla_export.comparison.markdown import to_markdown
    from qvla_export.comparison.page import render
    from qvla_export.pipeline.run_folder import RunFolder, made
    from qvla_export.sensitivity.sensitivities import Sensitivities
    from qvla_export.shared.artifacts import write_bytes

    first = RunFolder(wanted.root / f"seed-{wanted.seeds[0]}")
    measured = Sensitivities.load(made(first.sensitivities, "compare"))
    page, text = wanted.output.with_suffix(".html"), wanted.output.with_suffix(".md")
    write_bytes(page, render(compared, measured).encode("utf-8", "replace"))
    write_bytes(text, to_markdown(compared).encode("utf-8", "replace"))
    _say(f"{wanted.output}, {page}, {text}")


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


def _say(text: str) -> None:
    Console().print(f"[bold]qvla[/bold] {text}", highlight=False)

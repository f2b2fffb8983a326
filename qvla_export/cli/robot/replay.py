"""`qvla replay`: a recording, played to a policy."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import (
    A_POLICY,
    A_RECORDING,
    PresetOption,
    ThreadsOption,
    UnnormKeyOption,
    WeightsOption,
)
from qvla_export.cli.progress import print_texts, progress_shown


def replay(
    recording: Annotated[
        Path,
        typer.Argument(
            help="MCAP file of `qvla serve --record` or `qvla run --record`.",
            callback=A_RECORDING.require,
        ),
    ],
    policy: Annotated[
        str,
        typer.Argument(help="Checkpoint, bundle, or URL of a server.", callback=A_POLICY.require),
    ],
    output: Annotated[Path | None, typer.Option("--output", help="Replay JSON to write.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Observations at most; default all.")
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(help="Exit with 1 where a normalized action differs by more than this."),
    ] = None,
    threads: ThreadsOption = None,
    weights: WeightsOption = "tuned",
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Ask a policy what it would have done: its actions and times against the recorded ones."""
    from jetson.recording.replay_lines import replay_lines
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.robot.replay import replay as replay_recording

    source = PolicySource(policy, unnorm_key, preset, threads, weights)
    with progress_shown() as on_progress:
        replayed = replay_recording(recording, source, limit, on_progress)
    print_texts(replay_lines(replayed))
    if output is not None:
        replayed.save(output)
        typer.echo(f"replay: {output}")
    if max_drift is not None and replayed.drift.worst > max_drift:
        typer.echo(f"drift {replayed.drift.worst:.3g} is above {max_drift:g}", err=True)
        raise typer.Exit(1)

"""`qvla replay`: a recording, played to a policy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvla_export.cli.options import (
    A_POLICY,
    A_RECORDING,
    PresetOption,
    ThreadsOption,
    UnnormKeyOption,
    WeightsOption,
)
from qvla_export.cli.progress import progress_shown

if TYPE_CHECKING:
    from jetson.recording.replay import Replay


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
    weights: WeightsOption = "packed",
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Ask a policy what it would have done: its actions and times against the recorded ones."""
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.robot.replay import replay as replay_recording

    source = PolicySource(policy, unnorm_key, preset, threads, weights)
    with progress_shown() as on_progress:
        replayed = replay_recording(recording, source, limit, on_progress)
    for line in (*_drift_lines(replayed), *_notes(replayed)):
        typer.echo(line)
    if output is not None:
        replayed.save(output)
        typer.echo(f"replay: {output}")
    if max_drift is not None and replayed.drift.worst > max_drift:
        typer.echo(f"drift {replayed.drift.worst:.3g} is above {max_drift:g}", err=True)
        raise typer.Exit(1)


def _drift_lines(replayed: "Replay") -> list[str]:
    drift = replayed.drift
    bundle = ""
    if replayed.digest and replayed.recorded_digest:
        same = replayed.digest == replayed.recorded_digest
        bundle = ", the same bundle" if same else ", another bundle"
    lines = [
        f"{drift.observations} observations{bundle}: "
        f"max |difference| {drift.worst:.3g}, RMS {drift.rms:.3g} normalized, "
        f"cosine {drift.cosine:.6f}, worst at observation {replayed.worst}"
    ]
    lines += [
        f"  dimension {index}: max {largest:.4g}, mean {mean:.4g}"
        for index, (largest, mean) in enumerate(
            zip(drift.max_physical, drift.mean_physical, strict=True)
        )
    ]
    return lines


def _notes(replayed: "Replay") -> list[str]:
    from qvla_export.shared.latency_statistics import tail

    lines = []
    if replayed.has_times:
        (slow, then_ms), (_, now_ms) = tail(replayed.recorded_ms), tail(replayed.replayed_ms)
        lines.append(
            f"policy's spans: p50 {replayed.percentile_ms('recorded', 50):.2f} ms then, "
            f"{replayed.percentile_ms('replayed', 50):.2f} ms now; "
            f"{slow} {then_ms:.2f} ms then, {now_ms:.2f} ms now"
        )
    if not replayed.lossless:
        lines.append("pictures were recorded as JPEG: some of the difference is theirs")
    if replayed.dropped:
        lines.append(
            f"{replayed.dropped} events are not in the recording: the disk could not follow"
        )
    if replayed.dropped is None:
        lines.append("the recording has no end: its recorder was killed, the last second is lost")
    return lines

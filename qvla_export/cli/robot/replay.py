"""`qvla replay`: a recording, played to a policy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvla_export.cli.options import (
    A_POLICY,
    A_RECORDING,
    PresetOption,
    ThreadsOption,
    UnnormKeyOption,
    WeightsOption,
)

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
    from jetson.recording.reader import Recording
    from jetson.recording.replay import replay_recording
    from qvla_export.pipeline.policy_source import PolicySource

    recorded = Recording(recording)
    opened: Any = PolicySource(policy, unnorm_key, preset, threads, weights)()
    try:
        done = replay_recording(recorded, opened, limit)
    finally:
        # A remote policy has a connection, a bundle's an engine.
        getattr(getattr(opened, "engine", opened), "close", lambda: None)()
    for line in _said(done):
        typer.echo(line)
    if output is not None:
        done.save(output)
        typer.echo(f"replay: {output}")
    if max_drift is not None and done.drift.worst > max_drift:
        typer.echo(f"drift {done.drift.worst:.3g} is above {max_drift:g}", err=True)
        raise typer.Exit(1)


def _said(done: "Replay") -> list[str]:
    from qvla_export.shared.latency_statistics import tail

    drift = done.drift
    bundle = ""
    if done.digest and done.recorded_digest:
        bundle = ", the same bundle" if done.digest == done.recorded_digest else ", another bundle"
    lines = [
        f"{drift.observations} observations{bundle}: "
        f"max |difference| {drift.worst:.3g}, RMS {drift.rms:.3g} normalized, "
        f"cosine {drift.cosine:.6f}, worst at observation {done.worst}"
    ]
    lines += [
        f"  dimension {index}: max {largest:.4g}, mean {mean:.4g}"
        for index, (largest, mean) in enumerate(
            zip(drift.max_physical, drift.mean_physical, strict=True)
        )
    ]
    if done.times_known:
        (slow, then_ms), (_, now_ms) = tail(done.recorded_ms), tail(done.replayed_ms)
        lines.append(
            f"policy's spans: p50 {done.percentile_ms('recorded', 50):.2f} ms then, "
            f"{done.percentile_ms('replayed', 50):.2f} ms now; "
            f"{slow} {then_ms:.2f} ms then, {now_ms:.2f} ms now"
        )
    if not done.lossless:
        lines.append("pictures were recorded as JPEG: some of the difference is theirs")
    if done.dropped:
        lines.append(f"{done.dropped} events are not in the recording: the disk could not follow")
    if done.dropped is None:
        lines.append("the recording has no end: its recorder was killed, the last second is lost")
    return lines

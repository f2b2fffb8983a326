"""What a replay says to a reader, in lines."""

from collections.abc import Iterator

from jetson.recording.replay import Replay
from qvla_export.shared.latency_statistics import tail
from qvla_export.shared.recorded_messages import COMPLETE


def replay_lines(replayed: Replay) -> Iterator[str]:
    """Yield how far the actions are from the recorded ones, times then and now, what is amiss."""
    yield from _drift_lines(replayed)
    if replayed.has_times:
        (slow, then_ms), (_, now_ms) = tail(replayed.recorded_ms), tail(replayed.replayed_ms)
        yield (
            f"policy's spans: p50 {replayed.percentile_ms('recorded', 50):.2f} ms then, "
            f"{replayed.percentile_ms('replayed', 50):.2f} ms now; "
            f"{slow} {then_ms:.2f} ms then, {now_ms:.2f} ms now"
        )
    if not replayed.lossless:
        yield "pictures were recorded as JPEG: some of the difference is theirs"
    if replayed.dropped:
        yield f"{replayed.dropped} events are not in the recording: the disk could not follow"
    if replayed.ended not in (None, COMPLETE):
        yield f"not all was recorded, or is here: {replayed.ended}"
    if replayed.dropped is None:
        yield "the recording has no end: its recorder was killed, the last second is lost"


def _drift_lines(replayed: Replay) -> Iterator[str]:
    drift, bundle = replayed.drift, ""
    if replayed.digest and replayed.recorded_digest:
        same = replayed.digest == replayed.recorded_digest
        bundle = ", the same bundle" if same else ", another bundle"
    yield (
        f"{drift.observations} observations{bundle}: "
        f"max |difference| {drift.worst:.3g}, RMS {drift.rms:.3g} normalized, "
        f"cosine {drift.cosine:.6f}, worst at observation {replayed.worst}"
    )
    physical = zip(drift.max_physical, drift.mean_physical, strict=True)
    for index, (largest, mean) in enumerate(physical):
        yield f"  dimension {index}: max {largest:.4g}, mean {mean:.4g}"

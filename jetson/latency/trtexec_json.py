"""Latencies in the JSON of NVIDIA's trtexec, for the tools that read `--exportTimes` and
`--exportProfile`.

Layout: NVIDIA/TensorRT, samples/common/sampleReporting.cpp, release 10. The readers beside trtexec,
samples/trtexec/{tracer,profiler}.py, take it too.
"""

from collections import Counter
from typing import Any

import numpy as np

from engines.layer_times import LayerTimes
from jetson.latency.profile import LatencyProfile
from qvla_export.shared.clock import inner_span, whole_spans
from qvla_export.shared.errors import QvlaError

_TO_DEVICE, _TO_HOST = (
    inner_span("engine", "host_to_device"),
    inner_span("engine", "device_to_host"),
)


def times_json(profile: LatencyProfile) -> list[dict[str, float]]:
    """Return what trtexec writes for `--exportTimes`: one object an action, milliseconds.

    "Enq" is the host's call of the engine, which here returns when the result is there; "Compute"
    the engine's parts one after the other, by the device's events where it has them. Where there
    is no device to copy to, its copies begin and end at once, as with trtexec's --noDataTransfers.

    Raises:
        QvlaError: the engine ran in another process, or the policy has no span "engine".
    """
    samples = profile.samples_ms
    if profile.transport != "in-process" or "engine" not in samples:
        raise QvlaError(
            f"times of the engine need a bundle or checkpoint in this process, {profile.name!r} "
            f"was measured {profile.transport} with spans {list(samples)}; give its folder"
        )
    whole = whole_spans(samples)
    before = whole[: whole.index("engine")]
    parts = [s for s in samples if s.startswith(inner_span("engine", ""))]
    graphs = [s for s in parts if s not in (_TO_DEVICE, _TO_HOST)] or ["engine"]
    rows = []
    for index, started_ms in enumerate(profile.started_ms):
        taken = {span: float(values[index]) for span, values in samples.items()}
        call = float(started_ms) + sum(taken[span] for span in before)
        compute = sum(taken[span] for span in graphs)
        h2d, d2h = taken.get(_TO_DEVICE, 0.0), taken.get(_TO_HOST, 0.0)
        row = {
            "startEnqMs": call, "endEnqMs": call + taken["engine"],
            "startH2dMs": call, "endH2dMs": call + h2d,
            "startComputeMs": call + h2d, "endComputeMs": call + h2d + compute,
            "startD2hMs": call + h2d + compute, "endD2hMs": call + h2d + compute + d2h,
            "h2dMs": h2d, "computeMs": compute, "d2hMs": d2h, "latencyMs": h2d + compute + d2h,
        }  # fmt: skip
        rows.append({name: round(ms, 6) for name, ms in row.items()})
    return rows


def profile_json(times: LayerTimes) -> list[dict[str, Any]]:
    """Return what trtexec writes for `--exportProfile`: the passes, then one object a layer.

    Readers find a layer by its name, so where there are several parts their names lead, and a name
    that comes again is numbered.
    """
    several = len({row.part for row in times.rows}) > 1
    total = sum(float(row.samples_ms.sum()) for row in times.rows)
    taken: Counter[str] = Counter()
    layers: list[dict[str, Any]] = [{"count": times.passes}]
    for row in times.rows:
        name = f"{row.part}: {row.name}" if several else row.name
        taken[name] += 1
        ms = float(row.samples_ms.sum())
        layers.append(
            {
                "name": name if taken[name] == 1 else f"{name} ({taken[name]})",
                "timeMs": round(ms, 6),
                "averageMs": round(float(np.mean(row.samples_ms)), 6),
                "medianMs": round(row.median_ms, 6),
                "percentage": round(100 * ms / total, 6) if total else 0.0,
            }
        )
    return layers

"""The noun `DeployedSetting`: one row of the table of float against quantized."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.artifacts import read_json


@dataclass(frozen=True)
class DeployedSetting:
    """One row of the table of float against quantized."""

    setting: str
    bundle: Path
    bundle_bytes: int
    # Bytes of the planned layers, of those in float16.
    layer_ratio: float
    # Held-out RMS of normalized actions against the float policy's.
    action_rms: float
    # Divergence of the distributions over action tokens, nats (eq. 2); None without tokens.
    token_kl: float | None
    # Of simulated episodes, with its Wilson 95 % interval; None where none were run.
    success: float | None
    success_interval: tuple[float, float] | None
    # Latency: the median, and the p99 or, of few samples, the max; None where it was not measured.
    p50_ms: float | None
    tail: Literal["p99", "max"] | None
    tail_ms: float | None


def deployed_settings(run: RunFolder, settings: Sequence[Setting]) -> tuple[DeployedSetting, ...]:
    """Return a row of each setting of a run whose bundles were made and judged."""
    from qvla_export.shared.bundle import Bundle

    latency = _latencies(run)
    rows = []
    for setting in settings:
        bundle = Bundle.load(run.bundle(setting))
        layers = sum(n for part, n in bundle.weight_bytes.items() if part != "rest")
        error = read_json(run.action_error(setting), "action error")
        success, interval = _success(run, setting)
        p50, tail, tail_ms = latency.get(setting.name, (None, None, None))
        row = DeployedSetting(
            setting.name,
            bundle.path,
            bundle.nbytes,
            1.0 if bundle.plan is None else layers / bundle.plan["float16_bytes"],
            error["rms"],
            error.get("token_kl"),
            success,
            interval,
            p50,
            tail,
            tail_ms,
        )
        rows.append(row)
    return tuple(rows)


def _success(
    run: RunFolder, setting: Setting
) -> tuple[float, tuple[float, float]] | tuple[None, None]:
    path = run.evaluation(setting)
    if not path.is_file():
        return None, None
    summary = read_json(path, "evaluation")["summary"]
    low, high = summary["wilson_95"]
    return summary["success"], (low, high)


def _latencies(run: RunFolder) -> dict[str, tuple[float, Any, float]]:
    """Setting -> p50, and the name and value of its tail; empty where no latency was measured."""
    from jetson.latency.comparison import LatencyComparison
    from qvla_export.shared.latency_statistics import tail

    if not run.latency.is_file():
        return {}
    return {
        profile.name: (profile.percentile_ms(50), *tail(profile.samples_ms["total"]))
        for profile in LatencyComparison.load(run.latency).profiles
    }

"""What other stages measured, as much of it as is drawn, read from their JSON.

The stages' own nouns live in packages that this one must not import. Figures are computed from the
raw episodes and samples; the summaries in the files are for readers and are not believed.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.report.motion import MotionFigures, motion_of
from qvla_export.shared.artifacts import read_json, require_fields
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.latency_statistics import LATENCY_FORMAT, Deadline


@dataclass(frozen=True)
class Share:
    """A share of episodes with its Wilson 95 % interval."""

    solved: int
    episodes: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Return the solved episodes over all."""
        return self.solved / self.episodes


@dataclass(frozen=True)
class ActionError:
    """Difference of an engine's actions from the float torch policy's, on held-out observations."""

    bundle_digest: str
    # Observations compared.
    held_out: int
    # Mean over observations of ||dA||^2, and root mean square of one number; normalized.
    mse: float
    rms: float
    # |difference| by action dimension, normalized (the range is 2) and in the robot's units.
    mean_abs_normalized: tuple[float, ...]
    max_abs_normalized: tuple[float, ...]
    mean_abs_physical: tuple[float, ...]
    # Largest |difference| of the engine from torch with the same quantized weights: the floor.
    engine_drift_max: float
    cosine: float
    # Divergence of the distributions over an action's tokens, nats; None without tokens.
    token_kl: float | None = None


@dataclass(frozen=True)
class Rollouts:
    """Closed-loop episodes of one policy."""

    policy: str
    # Of its checkpoint or bundle.
    digest: str
    control: str
    # Which episodes were run and how: count, first seed, actions executed.
    episodes: tuple[int, int, int]
    success: Share
    by_task: Mapping[str, Share]
    # Running sum of ||dA||^2 by decision; an episode that has ended keeps its sum.
    # float64 [episodes, decisions]; no columns where deviations were not recorded
    cumulative: NDArray[np.float64]
    motion: MotionFigures


@dataclass(frozen=True)
class Ratio:
    """Median latency over the baseline's, with a bootstrap interval."""

    baseline: str
    value: float
    low: float
    high: float
    # Of the interval, for example 0.95.
    confidence: float


@dataclass(frozen=True)
class Latency:
    """Milliseconds of every measured action of one setting."""

    bundle_digest: str
    # Span -> samples; "total" covers them all.  float64 [n]
    samples_ms: Mapping[str, NDArray[np.float64]]
    # To the first profile's total; None for that profile itself.
    ratio: Ratio | None
    transport: str
    machine: str
    # From starting to open the policy until it was loaded; None where nobody measured it.
    load_ms: float | None
    first_action_ms: float
    # Until when actions were wanted; None where nobody said.
    deadline: Deadline | None
    # Largest of processes that held this policy alone; None where none was started.
    resident_bytes: int | None = None
    device_bytes: int | None = None

    def percentile(self, percent: float, span: str = "total") -> float:
        """Return a percentile of a span's samples, milliseconds."""
        return float(np.percentile(self.samples_ms[span], percent))


@dataclass(frozen=True)
class RankAgreement:
    """Estimated against exact sensitivities on sampled (channel, width) pairs."""

    sensitivities_digest: str
    spearman: float
    spearman_by_width: Mapping[int, float]
    # Observations of the exact measurement.
    samples: int
    first_order_seconds: float
    # Of all channels and widths, extrapolated.
    exact_all_seconds: float
    # Per pair.  int64 [n], float64 [n], float64 [n]
    bits: NDArray[np.int64]
    estimated: NDArray[np.float64]
    exact: NDArray[np.float64]


@contextlib.contextmanager
def damage_named(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a misshapen value causes in the block into an ArtifactError with the path."""
    try:
        yield
    except QvlaError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise ArtifactError(f"{what} {path} is damaged ({kind}: {error}); make it anew") from error


def read_object(path: Path, what: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """Read a JSON object that has at least the given fields.

    Raises:
        ArtifactError: the file is missing, no JSON, no object or lacks fields.
    """
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise ArtifactError(f"{what} {path} must be a JSON object; make it anew")
    require_fields(value, fields, f"{what} {path}")
    return value


def read_action_error(path: Path) -> ActionError:
    """Read `action_error.json`."""
    fields = tuple(name for name in ActionError.__dataclass_fields__ if name != "token_kl")
    value = read_object(path, "action error", fields)
    divergence = value.get("token_kl")
    with damage_named(path, "action error"):
        normalized, largest, physical = (
            tuple(finite(value[name]).reshape(-1).tolist())
            for name in ("mean_abs_normalized", "max_abs_normalized", "mean_abs_physical")
        )
        if not len(normalized) == len(largest) == len(physical):
            raise ValueError("dimensions differ in number")
        return ActionError(
            bundle_digest=str(value["bundle_digest"]),
            held_out=int(value["held_out"]),
            mse=float(finite(value["mse"])),
            rms=float(finite(value["rms"])),
            mean_abs_normalized=normalized,
            max_abs_normalized=largest,
            mean_abs_physical=physical,
            engine_drift_max=float(finite(value["engine_drift_max"])),
            cosine=float(finite(value["cosine"])),
            token_kl=None if divergence is None else float(finite(divergence)),
        )


def read_rollouts(path: Path) -> Rollouts:
    """Read an evaluation in the format of `calibration.benchmarks.rollouts`."""
    value = read_object(path, "evaluation", ("policy", "digest", "config", "results"))
    with damage_named(path, "evaluation"):
        results = [(str(r["task"]), bool(r["success"])) for r in value["results"]]
        if not results:
            raise ValueError("no episodes")
        tasks = {
            task: [solved for name, solved in results if name == task]
            for task in value["config"]["tasks"]
        }
        return Rollouts(
            policy=str(value["policy"]),
            digest=str(value["digest"]),
            control=str(value["config"]["control"]),
            episodes=_episodes(value["config"]),
            success=_share([solved for _, solved in results]),
            by_task={task: _share(solved) for task, solved in tasks.items() if solved},
            cumulative=_cumulative([row["deviations"] for row in value["results"]]),
            motion=motion_of(value["results"]),
        )


def _episodes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    return int(config["episodes"]), int(config["seed"]), int(config["execute"])


def read_latencies(path: Path) -> dict[str, Latency]:
    """Read `latency.json` as `latency.comparison` writes it; the first profile is the baseline."""
    value = read_object(path, "latency", ("format",))
    if value["format"] != LATENCY_FORMAT:
        raise ArtifactError(
            f"latency {path} must be of format {LATENCY_FORMAT!r}, it has {value['format']!r:.60}; "
            "delete it and run `qvla deploy` again, which measures anew"
        )
    require_fields(value, ("profiles", "ratios", "deadline"), f"latency {path}")
    with damage_named(path, "latency"):
        return latencies_of(value)


def latencies_of(value: Mapping[str, Any]) -> dict[str, Latency]:
    """Return the profiles of a latency's document by name; what is misshapen raises anything."""
    starts = value.get("cold_starts", {})
    ratios = {
        str(r["name"]): Ratio(
            str(r["baseline"]),
            *(float(finite(r[k])) for k in ("ratio", "low", "high", "confidence")),
        )
        for r in value["ratios"]
        if r["stage"] == "total"
    }
    deadline = _deadline(value["deadline"])
    return {
        str(item["name"]): replace(
            _latency(item, ratios.get(str(item["name"])), deadline),
            resident_bytes=_largest(starts.get(item["name"], ()), "resident_bytes"),
            device_bytes=_largest(starts.get(item["name"], ()), "device_bytes"),
        )
        for item in value["profiles"]
    }


def read_agreement(path: Path) -> RankAgreement:
    """Read what `sensitivity.agreement.Agreement` saved, without its import of torch."""
    fields = tuple(RankAgreement.__dataclass_fields__)[:6]
    value = read_object(path, "agreement", (*fields, "pairs"))
    with damage_named(path, "agreement"):
        _, _, bits, estimated, exact = zip(*value["pairs"], strict=True)
        return RankAgreement(
            sensitivities_digest=str(value["sensitivities_digest"]),
            spearman=float(finite(value["spearman"])),
            spearman_by_width={int(k): float(v) for k, v in value["spearman_by_width"].items()},
            samples=int(value["samples"]),
            first_order_seconds=float(finite(value["first_order_seconds"])),
            exact_all_seconds=float(finite(value["exact_all_seconds"])),
            bits=np.array([int(b) for b in bits], np.int64),
            estimated=finite(estimated),
            exact=finite(exact),
        )


def _deadline(value: Any) -> Deadline | None:
    if value is None:
        return None
    try:
        return Deadline(float(value["rate_hz"]), int(value["execute"]))
    except QvlaError as error:
        raise ValueError(str(error)) from None


def _latency(item: Mapping[str, Any], ratio: Ratio | None, deadline: Deadline | None) -> Latency:
    samples = {str(span): finite(values) for span, values in item["samples_ms"].items()}
    if "total" not in samples or any(v.ndim != 1 or not v.size for v in samples.values()):
        raise ValueError("a profile needs samples of 'total' and of every span")
    board = item["board_before"]
    machine = str(board["model"] or board["cpu_model"] or "unnamed machine")
    load_ms = None if item["load_ms"] is None else float(finite(item["load_ms"]))
    return Latency(
        str(item["bundle_digest"]),
        samples,
        ratio,
        str(item["transport"]),
        machine,
        load_ms,
        float(finite(item["first_action_ms"])),
        deadline,
    )


def _largest(starts: Iterable[Mapping[str, Any]], name: str) -> int | None:
    return max((int(s[name]) for s in starts if s.get(name) is not None), default=None)


def _share(solved: list[bool]) -> Share:
    from scipy.stats import binomtest  # half a second; a run without rollouts need not pay

    interval = binomtest(sum(solved), len(solved)).proportion_ci(0.95, method="wilson")
    return Share(sum(solved), len(solved), float(interval.low), float(interval.high))


def _cumulative(deviations: list[list[float]]) -> NDArray[np.float64]:
    longest = max(len(row) for row in deviations)
    padded = np.zeros((len(deviations), longest))
    for row, values in zip(padded, deviations, strict=True):
        row[: len(values)] = finite(values) if values else 0.0
    sums: NDArray[np.float64] = np.cumsum(padded, axis=1)
    return sums


def finite(value: Any) -> NDArray[np.float64]:
    array = np.asarray(value, np.float64)
    if not np.isfinite(array).all():
        raise ValueError("a number is not finite")
    return array

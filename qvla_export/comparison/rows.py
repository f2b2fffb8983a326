"""The noun `Row`: what was measured of one contestant, of each seed and pooled."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qvla_export.comparison.paired import PairedDifference, paired_difference, wilson_95
from qvla_export.shared.errors import QvlaError

EngineName = Literal["onnxruntime", "torch"]


@dataclass(frozen=True)
class Outcome:
    """One episode."""

    task: str
    # Of the scene; the same one is the same scene to every contestant.
    seed: int
    solved: bool
    # Sum over the episode's decisions of ||A - A*||^2, normalized; None without a reference.
    deviation: float | None
    # That several tasks may share: with equal seeds they are put in the same places. Empty in
    # comparisons of before.
    scene: str = ""
    # RMS jerk of the hand, m/s^3, and how often the gripper was told to turn round; None where the
    # motion was not recorded.
    jerk_rms: float | None = None
    gripper_flips: int | None = None


@dataclass(frozen=True)
class Cost:
    """What a contestant's layers take, on the target, scales included."""

    weight_bytes: int
    float16_bytes: int
    # Mean widths, every channel or every weight counting the same; and what is stored per weight.
    bits_per_channel: float
    bits_per_weight: float
    stored_bits_per_weight: float


@dataclass(frozen=True)
class SeedRow:
    """One contestant with the calibration set and the episodes of one seed."""

    seed: int
    # Of the bundle, plan or baseline that was judged.
    digest: str
    # What ran it.
    engine: EngineName
    cost: Cost
    # Held-out observations, and the actions' difference from float torch on them: root mean square
    # normalized, mean |difference| by dimension normalized and in the robot's units.
    held_out: int
    rms: float
    normalized: tuple[float, ...]
    physical: tuple[float, ...]
    # Stage -> wall-clock and CPU seconds of making it; stages of unknown time are left out.
    seconds: Mapping[str, float] = field(default_factory=dict)
    cpu_seconds: Mapping[str, float] = field(default_factory=dict)
    # The library with its version, where one made it.
    library: str | None = None
    # Closed loop; none where they were not run.
    episodes: tuple[Outcome, ...] = ()
    # Mean running sum of deviations by decision (eq. 5); an ended episode keeps its sum.
    cumulative: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """One contestant, pooled over seeds.

    Raises:
        QvlaError: no seed, or one twice.
    """

    name: str
    seeds: tuple[SeedRow, ...]

    def __post_init__(self) -> None:
        numbers = [row.seed for row in self.seeds]
        if not numbers or len({*numbers}) != len(numbers):
            raise QvlaError(f"{self.name} needs each seed once, got {numbers}")

    @property
    def rms(self) -> float:
        """Return the action error, mean over seeds."""
        return statistics.fmean(row.rms for row in self.seeds)

    @property
    def rms_spread(self) -> float:
        """Return the action error's standard deviation over seeds; 0 of one."""
        values = [row.rms for row in self.seeds]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def physical(self) -> tuple[float, ...]:
        """Return the mean |difference| by dimension in the robot's units, mean over seeds."""
        return _means([row.physical for row in self.seeds])

    @property
    def normalized(self) -> tuple[float, ...]:
        """Return the same, normalized."""
        return _means([row.normalized for row in self.seeds])

    @property
    def weight_bytes(self) -> float:
        """Return the mean over seeds: plans of other sensitivities differ a little."""
        return statistics.fmean(row.cost.weight_bytes for row in self.seeds)

    @property
    def ratio(self) -> float:
        """Return `weight_bytes` over the bytes in float16."""
        return self.weight_bytes / self.seeds[0].cost.float16_bytes

    def mean_cost(self, name: str) -> float:
        """Return the mean over seeds of one field of `Cost`."""
        return statistics.fmean(getattr(row.cost, name) for row in self.seeds)

    @property
    def total_seconds(self) -> float | None:
        """Return the seconds to quantize, mean over the seeds that know; None where none does."""
        known = [sum(row.seconds.values()) for row in self.seeds if row.seconds]
        return statistics.fmean(known) if known else None

    @property
    def total_cpu_seconds(self) -> float | None:
        """Return the same in CPU time, which other work on the machine hardly moves."""
        known = [sum(row.cpu_seconds.values()) for row in self.seeds if row.cpu_seconds]
        return statistics.fmean(known) if known else None

    @property
    def engines(self) -> str:
        """Return the engines that ran it."""
        return ", ".join(dict.fromkeys(row.engine for row in self.seeds))

    @property
    def episodes(self) -> tuple[Outcome, ...]:
        """Return the episodes of all seeds."""
        return tuple(outcome for row in self.seeds for outcome in row.episodes)

    @property
    def success(self) -> float | None:
        """Return the share of solved episodes; None without any."""
        return statistics.fmean(o.solved for o in self.episodes) if self.episodes else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the Wilson 95 % interval of that share."""
        solved = sum(outcome.solved for outcome in self.episodes)
        return wilson_95(solved, len(self.episodes)) if self.episodes else None

    @property
    def deviation(self) -> float | None:
        """Return the cumulative deviation at an episode's end, mean of all; None where unknown."""
        values = [o.deviation for o in self.episodes if o.deviation is not None]
        return statistics.fmean(values) if values else None

    @property
    def motion(self) -> tuple[float, float] | None:
        """Return an episode's RMS jerk and gripper flips, means of all; None where unknown."""
        moved = [
            (o.jerk_rms, o.gripper_flips)
            for o in self.episodes
            if o.jerk_rms is not None and o.gripper_flips is not None
        ]
        if not moved or len(moved) < len(self.episodes):
            return None
        jerks, flips = zip(*moved, strict=True)
        return statistics.fmean(jerks), statistics.fmean(flips)

    @property
    def cumulative(self) -> tuple[float, ...]:
        """Return the mean running sum by decision; a seed of shorter episodes keeps its last."""
        curves = [row.cumulative for row in self.seeds if row.cumulative]
        longest = max((len(curve) for curve in curves), default=0)
        return _means([curve + curve[-1:] * (longest - len(curve)) for curve in curves])

    def against(self, reference: "Row") -> PairedDifference | None:
        """Return the difference to a reference on the episodes that both have run."""
        theirs = {(o.task, o.seed): o.solved for o in reference.episodes}
        shared = [o for o in self.episodes if (o.task, o.seed) in theirs]
        if not shared:
            return None
        return paired_difference(
            [o.solved for o in shared],
            [theirs[o.task, o.seed] for o in shared],
            [(o.scene or o.task, o.seed) for o in shared],
        )


def _means(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(statistics.fmean(values) for values in zip(*rows, strict=True))

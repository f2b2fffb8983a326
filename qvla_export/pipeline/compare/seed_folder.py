"""The noun `Stand`: one seed's run folder, or one inside it, where contestants are made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, TypeVar

from qvla_export.comparison.comparison import Ranks
from qvla_export.comparison.contestants import Contestant
from qvla_export.pipeline import moments as compensating
from qvla_export.pipeline import plan as stages
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.reuse import kept_artifact
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.artifacts import read_json, write_json
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from calibration.calibration_set import CalibrationSet
    from calibration.sources.lerobot import LeRobotDataset
    from qvla_export.policies.base import Policy

T = TypeVar("T")
# Of smoothing.
_STRENGTH = 0.5
# Of Fig. 7: width, observations of one episode, and what sets their seed apart.
_RANKED_BITS = 4
_FRAMES_ALONG = 16
_OTHER_EPISODES = 1_000


@dataclass(frozen=True)
class Stand:
    """A run folder of one seed, or one inside it of another checkpoint or fewer observations."""

    run: RunFolder
    seed: int
    source: PolicySource
    policy: "Policy"
    target: Target
    # Environment of the libraries.
    environment: Path
    # Whether plans are rounded with codes that make up for each other's errors.
    compensated: bool = False
    # Stage -> seconds of what was done before, in another folder.
    earlier: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def timed(self, name: str, artifact: Path, work: Callable[[], T], always: bool = False) -> T:
        """Run a stage; keep its seconds if it made its artifact.

        Args:
            name: of the stage.
            artifact: what it makes.
            work: runs it.
            always: keep seconds also where none are known and the artifact stayed as it was; for
                stages that do their work whatever is there.
        """
        before, started, used = _stamp(artifact), perf_counter(), process_time()
        done = work()
        seconds = perf_counter() - started, process_time() - used
        recorded = self.seconds()
        if _stamp(artifact) != before or (always and name not in recorded):
            write_json(self._seconds, {**recorded, name: seconds})
        return done

    def seconds(self) -> dict[str, tuple[float, float]]:
        """Return stage -> wall-clock and CPU seconds of this folder."""
        kept = kept_artifact(self._seconds, lambda path: read_json(path, "seconds"))
        return {str(name): (float(a), float(b)) for name, (a, b) in (kept or {}).items()}

    @property
    def _seconds(self) -> Path:
        return self.run.root / "seconds.json"


def stand_of(base: Stand, contestant: Contestant) -> Stand:
    """Return where a contestant is made: the seed's folder or one inside it, with calibration."""
    stand = _smoothed(base) if contestant.smoothed else base
    if contestant.observations is not None:
        stand = _fewer(stand, contestant.observations)
    if contestant.compensated:
        inside = RunFolder(stand.run.root / "compensated")
        _same_observations(stand.run, inside, None)
        stand = replace(stand, run=inside, compensated=True)
    return stand


def sensitivities(stand: Stand) -> None:
    """Measure the sensitivities of a stand, timed."""
    from qvla_export.sensitivity.estimators.first_order import FirstOrderEstimator

    estimator = FirstOrderEstimator()
    if stand.compensated:
        stand.timed(
            "moments", stand.run.moments, lambda: compensating.moments(stand.run, stand.policy)
        )
    stand.timed(
        "sensitivities",
        stand.run.sensitivities,
        lambda: stages.sensitivities(
            stand.run,
            stand.policy,
            stand.target,
            estimator,
            stand.seed,
            compensated=stand.compensated,
        ),
    )


def _smoothed(base: Stand) -> Stand:
    """The same calibration set with an equal policy whose layers are fed no outliers."""
    from qvla_export.cli.research.smooth import smooth
    from qvla_export.pipeline.policy_source import open_checkpoint

    inside = RunFolder(base.run.root / "smoothed")
    _same_observations(base.run, inside, None)
    place = base.run.root / "smoothed-checkpoint"
    start, source = Path(base.source.place), base.source
    stand = replace(base, run=inside, source=replace(source, place=str(place)))
    stand.timed(
        "smoothing",
        place,
        lambda: (
            None
            if place.is_dir()
            else smooth(
                place,
                base.run.root,
                start,
                strength=_STRENGTH,
                unnorm_key=source.unnorm_key,
                preset=source.preset,
            )
        ),
    )
    earlier = {name: told for name, told in stand.seconds().items() if name == "smoothing"}
    smoothed = open_checkpoint(place, source.unnorm_key, source.preset)
    return replace(stand, policy=smoothed, earlier=earlier)


def _fewer(base: Stand, observations: int) -> Stand:
    inside = RunFolder(base.run.root / f"first-{observations}")
    _same_observations(base.run, inside, observations)
    return replace(base, run=inside)


def _same_observations(whole: RunFolder, inside: RunFolder, first: int | None) -> None:
    """Give a folder inside a run the run's set, or its first observations; held-out ones alike."""
    from calibration.calibration_set import CalibrationSet

    drawn = CalibrationSet.load(whole.calibration)
    wanted = drawn if first is None else _first(drawn, first)
    kept = kept_artifact(inside.calibration, CalibrationSet.load)
    if kept is None or kept.digest != wanted.digest:
        wanted.save(inside.calibration)


def _first(drawn: "CalibrationSet", count: int) -> "CalibrationSet":
    from calibration.calibration_set import CalibrationSet

    if not 0 < count <= len(drawn.observations):
        raise QvlaError(
            f"the calibration set has {len(drawn.observations)} observations, {count} were asked "
            "for; draw more: qvla compare --count"
        )
    source = {**drawn.source, "first": count}
    return CalibrationSet(drawn.observations[:count], drawn.held_out, source)


def _stamp(artifact: Path) -> tuple[int, int] | None:
    """What changes when an artifact is replaced."""
    if not artifact.exists():
        return None
    told = artifact.stat()
    return told.st_ino, told.st_mtime_ns


def cumulative_ranks(
    stand: Stand, dataset: "LeRobotDataset | None", tasks: Sequence[str], count: int
) -> Ranks:
    """Rank channels by one decision, on the stand's set, and along whole episodes (Fig. 7).

    Args:
        stand: has sensitivities.
        dataset: where episodes come from; None for the simulator.
        tasks: of the simulator.
        count: observations along episodes, 16 of each.
    """
    from qvla_export.comparison.ranks import rank_channels
    from qvla_export.sensitivity.estimators.cumulative import Cumulative
    from qvla_export.sensitivity.estimators.first_order import FirstOrderEstimator

    along = replace(stand, run=RunFolder(stand.run.root / "along-episodes"))
    # Other episodes than those the stand's set has.
    seed = stand.seed + _OTHER_EPISODES
    stages.calibrate(along.run, dataset, tasks, count, 1, seed, _FRAMES_ALONG)
    estimator = Cumulative(FirstOrderEstimator())
    summed = stages.sensitivities(along.run, stand.policy, stand.target, estimator, stand.seed)
    single = Sensitivities.load(stand.run.sensitivities)
    return rank_channels(
        _RANKED_BITS,
        (single.samples, summed.samples),
        {name: single.at(name, _RANKED_BITS) for name in single.values},
        {name: summed.at(name, _RANKED_BITS) for name in summed.values},
    )

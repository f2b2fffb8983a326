"""The noun `SeedFolder`: one seed's run folder, or one inside it, where contestants are made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, TypeVar

from qvla_export.comparison.comparison import Ranks
from qvla_export.comparison.contestants import Contestant
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.moments import moments
from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
from qvla_export.pipeline.progress import OnProgress, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current
from qvla_export.pipeline.sensitivities import Quantizer, SensitivityRequest, sensitivities
from qvla_export.pipeline.smooth import smooth_checkpoint
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.artifacts import read_json, write_json
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from calibration.calibration_set import CalibrationSet
    from calibration.sources.base import DataSource
    from qvla_export.policies.base import Policy

T = TypeVar("T")
# Of smoothing.
_STRENGTH = 0.5
# Of Fig. 7: width, observations of one episode, and what sets their seed apart.
_RANKED_BITS = 4
_FRAMES_ALONG = 16
_OTHER_EPISODES = 1_000


@dataclass(frozen=True)
class SeedFolder:
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
    # Stage -> wall-clock and CPU seconds of what was done before, in another folder.
    seconds_before: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def time_stage(
        self, name: str, artifact: Path, work: Callable[[], T], always: bool = False
    ) -> T:
        """Run a stage, and record its seconds if it made its artifact.

        Args:
            name: of the stage.
            artifact: what it makes.
            work: runs it.
            always: record seconds also where none are known and the artifact stayed as it was; for
                stages that do their work whatever is there.
        """
        before, start, start_cpu = _stamp(artifact), perf_counter(), process_time()
        result = work()
        seconds = perf_counter() - start, process_time() - start_cpu
        recorded = self.seconds()
        if _stamp(artifact) != before or (always and name not in recorded):
            write_json(self._seconds_file, {**recorded, name: seconds})
        return result

    def seconds(self) -> dict[str, tuple[float, float]]:
        """Return stage -> wall-clock and CPU seconds of this folder."""
        value = load_if_current(self._seconds_file, lambda path: read_json(path, "seconds"))
        return {str(name): (float(a), float(b)) for name, (a, b) in (value or {}).items()}

    @property
    def _seconds_file(self) -> Path:
        return self.run.root / "seconds.json"


def folder_for(
    base: SeedFolder, contestant: Contestant, on_progress: OnProgress = ignore
) -> SeedFolder:
    """Return where a contestant is made: the seed's folder or one inside it, with calibration.

    Raises:
        QvlaError: the checkpoint cannot be smoothed, or the set has too few observations.
    """
    folder = _smoothed_folder(base, on_progress) if contestant.smoothed else base
    if contestant.observations is not None:
        folder = _folder_of_first(folder, contestant.observations)
    if contestant.compensated:
        inside = RunFolder(folder.run.root / "compensated")
        _copy_observations(folder.run, inside, None)
        folder = replace(folder, run=inside, compensated=True)
    return folder


def measure_sensitivities(folder: SeedFolder, on_progress: OnProgress = ignore) -> Sensitivities:
    """Measure a folder's sensitivities, or keep them, with their seconds."""
    if folder.compensated:
        folder.time_stage(
            "moments",
            folder.run.moments,
            lambda: moments(folder.run, folder.policy, on_progress=on_progress),
        )
    quantizer: Quantizer = "compensated" if folder.compensated else "nearest"
    request = SensitivityRequest(quantizer=quantizer, seed=folder.seed)
    return folder.time_stage(
        "sensitivities",
        folder.run.sensitivities,
        lambda: sensitivities(
            folder.run, folder.policy, folder.target, request, on_progress=on_progress
        ),
    )


def _smoothed_folder(base: SeedFolder, on_progress: OnProgress) -> SeedFolder:
    """Return a folder of an equal policy whose layers are fed no outliers, with the same set."""
    from engines.targets import find_target

    inside = RunFolder(base.run.root / "smoothed")
    _copy_observations(base.run, inside, None)
    place = base.run.root / "smoothed-checkpoint"
    source = base.source
    folder = replace(base, run=inside, source=replace(source, place=str(place)))
    folder.time_stage(
        "smoothing",
        place,
        lambda: (
            None
            if place.is_dir()
            else smooth_checkpoint(
                base.run,
                source,
                place,
                find_target("cpu"),
                (_STRENGTH,),
                on_progress=on_progress,
            )
        ),
    )
    before = {name: took for name, took in folder.seconds().items() if name == "smoothing"}
    policy = open_checkpoint(place, source.unnorm_key, source.preset)
    return replace(folder, policy=policy, seconds_before=before)


def _folder_of_first(base: SeedFolder, observations: int) -> SeedFolder:
    inside = RunFolder(base.run.root / f"first-{observations}")
    _copy_observations(base.run, inside, observations)
    return replace(base, run=inside)


def _copy_observations(whole: RunFolder, inside: RunFolder, first: int | None) -> None:
    """Give a folder inside a run the run's set, or its first observations; held-out ones alike."""
    from calibration.calibration_set import CalibrationSet

    drawn = CalibrationSet.load(whole.calibration)
    part = drawn if first is None else _first_observations(drawn, first)
    earlier = load_if_current(
        inside.calibration, CalibrationSet.load, lambda old: old.digest == part.digest
    )
    if earlier is None:
        part.save(inside.calibration)


def _first_observations(drawn: "CalibrationSet", count: int) -> "CalibrationSet":
    from calibration.calibration_set import CalibrationSet

    if not 0 < count <= len(drawn.observations):
        raise QvlaError(
            f"the calibration set has {len(drawn.observations)} observations, {count} were asked "
            "for; draw more: qvla compare --count"
        )
    source = {**drawn.source, "first": count}
    return CalibrationSet(drawn.observations[:count], drawn.held_out, source)


def _stamp(artifact: Path) -> tuple[int, int] | None:
    """Return what changes when an artifact is replaced."""
    if not artifact.exists():
        return None
    status = artifact.stat()
    return status.st_ino, status.st_mtime_ns


def cumulative_ranks(
    folder: SeedFolder,
    dataset: "DataSource | None",
    tasks: Sequence[str],
    count: int,
    on_progress: OnProgress = ignore,
) -> Ranks:
    """Rank channels by one decision, on the folder's set, and along whole episodes (Fig. 7).

    Args:
        folder: has sensitivities.
        dataset: where episodes come from; None for the simulator.
        tasks: of the simulator.
        count: observations along episodes, 16 of each.
        on_progress: hears of the sensitivities along episodes.
    """
    from qvla_export.comparison.ranks import rank_channels

    along = RunFolder(folder.run.root / "along-episodes")
    # Other episodes than those the folder's set has.
    seed = folder.seed + _OTHER_EPISODES
    calibrate(along, CalibrationRequest(dataset, tuple(tasks), count, 1, seed, _FRAMES_ALONG))
    request = SensitivityRequest("cumulative-first-order", seed=folder.seed)
    cumulative = sensitivities(
        along, folder.policy, folder.target, request, on_progress=on_progress
    )
    single = Sensitivities.load(folder.run.sensitivities)
    return rank_channels(
        _RANKED_BITS,
        (single.samples, cumulative.samples),
        {name: single.at(name, _RANKED_BITS) for name in single.values},
        {name: cumulative.at(name, _RANKED_BITS) for name in cumulative.values},
    )

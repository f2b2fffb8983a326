"""The step that draws the calibration set, from a data set or the simulator."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.progress import OnProgress, Progress, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current, require_artifact
from qvla_export.pipeline.work.log import ArtifactWork, Value, recorded_work, short
from qvla_export.shared.artifacts import require_same
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from calibration.calibration_set import CalibrationSet
    from calibration.draw_size import DrawSize
    from calibration.sources.base import DataSource
    from qvla_export.shared.observation import Observation

_LOG = logging.getLogger(__name__)
_WORK = "calibration"
_MEASURE_AGAIN = "Measure and plan again on this set: qvla sensitivities, qvla plan."


@dataclass(frozen=True)
class CalibrationRequest:
    """Which observations to draw."""

    # None for the simulator, whose tasks follow.
    dataset: "DataSource | None" = None
    # Names of Meta-World tasks.
    tasks: tuple[str, ...] = ()
    # Observations to measure on and to judge by.
    count: int = 64
    held_out: int = 64
    seed: int = 0
    # Observations of one episode; None for the usual two.
    frames_per_episode: int | None = None
    # Whether frames of a data set without a usable state or instruction are left out.
    skip_bad_frames: bool = False


def calibrate(
    run: RunFolder, request: CalibrationRequest, on_progress: OnProgress = ignore
) -> "CalibrationSet":
    """Draw the calibration set of a run, or keep the one that was drawn in the same way.

    A data set's frames are read in any case: only they say whether they are what was drawn.

    Raises:
        QvlaError: the source lacks a column, a task or enough episodes.
    """
    from calibration.calibration_set import CalibrationSet

    redrawn = None if request.dataset is None else _draw(request)
    source = _simulator_source(request) if redrawn is None else dict(redrawn.source)

    def is_current(old: CalibrationSet) -> bool:
        if redrawn is None:
            # Sets drawn before actions were kept lack them.
            return dict(old.source) == source and old.demonstrations is not None
        drawn = (old.digest, old.demonstrations and old.demonstrations.digest)
        again = (redrawn.digest, redrawn.demonstrations and redrawn.demonstrations.digest)
        return dict(old.source) == source and drawn == again

    drawn = load_if_current(run.calibration, CalibrationSet.load, is_current)
    finished = drawn is not None
    if drawn is None:
        digest = None if redrawn is None else redrawn.digest
        with recorded_work(_calibration_work(run, source, digest), on_progress) as hear:
            hear(Progress(_WORK))
            (redrawn or _draw(request)).save(run.calibration)
        drawn = CalibrationSet.load(run.calibration)
    finish(on_progress, _WORK, finished)
    return drawn


def _draw(request: CalibrationRequest) -> "CalibrationSet":
    from calibration.calibration_set import FRAMES_PER_EPISODE, sample_dataset, sample_simulator

    how = (request.count, request.held_out, request.seed)
    frames = request.frames_per_episode or FRAMES_PER_EPISODE
    if request.dataset is None:
        return sample_simulator(list(request.tasks), *how, frames)
    size = fitting_draw(request, request.dataset)
    return sample_dataset(
        request.dataset,
        size.count,
        size.held_out,
        request.seed,
        size.frames,
        request.skip_bad_frames,
    )


def fitting_draw(request: CalibrationRequest, dataset: "DataSource") -> "DrawSize":
    """Return how much is drawn of a data set: of a small one what it has, with a warning."""
    from calibration.calibration_set import FRAMES_PER_EPISODE, drawing_order
    from calibration.draw_size import DrawSize, fitting_size

    said = request.frames_per_episode
    wish = DrawSize(request.count, request.held_out, said or FRAMES_PER_EPISODE)
    lengths = [dataset.episode_lengths[number] for number in drawing_order(dataset, request.seed)]
    size = fitting_size(lengths, wish, frames_fixed=said is not None)
    if size != wish:
        _LOG.warning(
            "%s has %d episodes: %d + %d observations, up to %d of one episode, are drawn instead "
            "of %d + %d, %d of one; figures of few episodes are less certain",
            *(dataset.root, len(lengths), size.count, size.held_out, size.frames),
            *(wish.count, wish.held_out, wish.frames),
        )
    return size


def _simulator_source(request: CalibrationRequest) -> dict[str, Any]:
    """Return what a set drawn from the simulator records: with the seed it says all."""
    from calibration.calibration_set import FRAMES_PER_EPISODE

    source: dict[str, Any] = {"simulator": list(request.tasks), "seed": request.seed}
    source |= {"count": request.count, "held_out": request.held_out}
    frames = request.frames_per_episode or FRAMES_PER_EPISODE
    return source | ({"frames_per_episode": frames} if frames != FRAMES_PER_EPISODE else {})


def _calibration_work(run: RunFolder, source: dict[str, Any], digest: str | None) -> ArtifactWork:
    """Return the record of a drawing: what a set's source says, under the names of options."""
    options: dict[str, Value] = {
        f"--{name.replace('_', '-')}": value
        if isinstance(value, str | int | float | bool | None)
        else json.dumps(value)
        for name, value in source.items()
    }
    if digest is not None:
        options["observations"] = short(digest)
    return ArtifactWork(run, run.calibration, options)


def put_calibration(
    run: RunFolder, drawn: "CalibrationSet", on_progress: OnProgress = ignore
) -> None:
    """Make observations that were drawn elsewhere a run's calibration set.

    Raises:
        ArtifactMismatch: the run has another one, which its other artifacts were made from.
    """
    from calibration.calibration_set import CalibrationSet

    kept = load_if_current(run.calibration, CalibrationSet.load, lambda old: True)
    if kept is None:
        drawn.save(run.calibration)
    else:
        remedy = f"Name another run folder than {run.root}, or remove it."
        require_same("run and observations", kept.digest, drawn.digest, remedy)
    finish(on_progress, _WORK, kept is not None)


def load_calibration(run: RunFolder) -> "CalibrationSet":
    """Read a run's calibration set.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    from calibration.calibration_set import CalibrationSet

    return CalibrationSet.load(require_artifact(run.calibration, "calibrate"))


def judging_observations(run: RunFolder, place: Path) -> "tuple[Observation, ...]":
    """Return observations of a calibration set to judge a run's plans by.

    All but those that the run's plans are made from: of the run's own set, what is held out. Other
    frames of the same episodes count as others.

    Raises:
        ArtifactError: a set is missing or damaged.
        QvlaError: the plans are made from all of them.
    """
    from calibration.calibration_set import CalibrationSet

    judges, own = CalibrationSet.load(place), load_calibration(run)
    same = judges.digest == own.digest
    candidates = judges.held_out if same else (*judges.observations, *judges.held_out)
    others = own.others(candidates)
    if not others:
        raise QvlaError(
            f"the plans of {run.root} are made from all of {place}; name another run's set, drawn "
            "with another --seed"
        )
    if len(others) < len(candidates):
        _LOG.warning(
            "%d of %d observations of %s judge nothing: the plans of %s are made from them",
            *(len(candidates) - len(others), len(candidates), place, run.root),
        )
    return others


def require_calibration(calibration: "CalibrationSet", digest: str, what: str) -> None:
    """Refuse a calibration set that sensitivities or a plan were not made from.

    Held-out observations of another set may be the very ones the plan was fitted to.

    Raises:
        ArtifactMismatch: naming both digests.
    """
    require_same(f"{what} and calibration set", digest, calibration.digest, _MEASURE_AGAIN)


def chosen_tasks(names: str | None) -> tuple[str, ...]:
    """Return the simulator's tasks that an option names; see `choose_tasks`.

    Raises:
        QvlaError: a name is unknown.
    """
    from calibration.benchmarks.metaworld.tasks import choose_tasks

    return choose_tasks(names)

"""The step that recommends a setting of a run, from what was measured of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.calibrate import CalibrationRequest, load_calibration
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.recommend.bounds import form_bounds, require_units
from qvla_export.pipeline.recommend.held_out_actions import HeldOutActions
from qvla_export.pipeline.recommend.next_commands import NextCommand, next_commands
from qvla_export.pipeline.recommend.open_loop import (
    Actions,
    groups_no_better_than_a_constant,
    open_loop_error,
)
from qvla_export.pipeline.recommend.recommendation import (
    ActionTime,
    Candidate,
    Recommendation,
    choose,
)
from qvla_export.pipeline.recommend.sentences import choice_sentences, doubts
from qvla_export.pipeline.recommend.tolerance import USUAL_TOLERANCE, Tolerance
from qvla_export.pipeline.recommend.traces import traces
from qvla_export.pipeline.run_folder import RunFolder, require_artifact
from qvla_export.shared.action_space import ActionLabels, ActionSpace, action_space
from qvla_export.shared.artifacts import require_same, write_json
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.policy_interface import load_interface

if TYPE_CHECKING:
    from calibration.demonstrated_actions import Demonstrations
    from qvla_export.shared.processor import Processor
    from qvla_export.shared.target import Target

_RECORDING = "the recording"
_REMEDY = "Run `qvla deploy` on this run folder again."


@dataclass(frozen=True)
class RecommendationRequest:
    """What is recommended from, for what, and by which bounds."""

    run: RunFolder
    settings: tuple[Setting, ...]
    target: str
    # The checkpoint, which may name its actions.
    source: PolicySource
    tolerance: Tolerance = USUAL_TOLERANCE
    # The command that this came from; empty where there was none.
    command: str = ""


def recommend(request: RecommendationRequest, processor: "Processor") -> Recommendation:
    """Choose the smallest setting under every bound, and write why into the run folder.

    Raises:
        ArtifactError: a setting's bundle or its held-out actions are missing or damaged.
        ArtifactMismatch: they are not of the run's calibration set.
        QvlaError: a tolerance is in a unit that nothing relates the action to.
    """
    from engines.load import runtime_here
    from engines.targets import find_target

    run, target = request.run, find_target(request.target)
    calibration = load_calibration(run)
    space = space_of(request, processor, labels_of(calibration.demonstrations))
    require_units(space, request.tolerance)
    actions, candidates, answers = _judged(request, space, processor, calibration.demonstrations)
    float_error = open_loop_error(space, actions, actions.float_policy)
    why = _no_actions(calibration.demonstrations, processor)
    bounds = form_bounds(space, float_error, request.tolerance, why)
    chosen = choose(candidates, bounds)
    strange = groups_no_better_than_a_constant(space, actions)
    result = Recommendation(
        target=target.name,
        calibration_digest=calibration.digest,
        space=space,
        float_error=float_error,
        bounds=bounds,
        candidates=tuple(candidates),
        setting=None if chosen is None else chosen.setting,
        sentences=choice_sentences(chosen, candidates, bounds, request.command),
        warnings=doubts(space, strange, bounds, chosen),
        commands=_commands(request, target, chosen, runtime_here(target) == target.runtime),
        traces=traces(actions.demonstrated, {"float policy": actions.float_policy, **answers}),
    )
    write_json(run.recommendation, result.to_json())
    return result


def space_of(
    request: RecommendationRequest, processor: "Processor", recording: ActionLabels | None
) -> ActionSpace:
    """Return the names and units of the policy's actions: the user's, checkpoint's, recording's.

    Raises:
        QvlaError: the user or the checkpoint names more or fewer numbers than an action has.
    """
    dim, labels = processor.spec.action_dim, [request.tolerance.labels]
    labels += _checkpoint_labels(request.source)
    # A recording of another robot's actions says nothing of these.
    if recording is not None and len(recording.names) in (0, dim):
        labels.append(recording)
    return action_space(dim, processor.statistics.action.mask, labels)


def labels_of(demonstrations: "Demonstrations | None") -> ActionLabels | None:
    """Return what a calibration set says of its actions."""
    if demonstrations is None:
        return None
    names, mm, deg = demonstrations.names, demonstrations.unit_mm, demonstrations.unit_deg
    return ActionLabels(_RECORDING, names, mm, deg)


def labels_before(run: RunFolder, calibration: CalibrationRequest | None) -> ActionLabels | None:
    """Return what will be known of the actions of a calibration set that is yet to be drawn."""
    from calibration.benchmarks.metaworld.simulator import ACTION_NAMES
    from calibration.benchmarks.metaworld.tasks import UNIT_MM
    from calibration.demonstrated_actions import ActionSource

    if calibration is None:
        return labels_of(load_calibration(run).demonstrations)
    if calibration.dataset is None:
        return ActionLabels(_RECORDING, ACTION_NAMES, UNIT_MM)
    data = calibration.dataset
    return ActionLabels(_RECORDING, data.action_names if isinstance(data, ActionSource) else ())


def _checkpoint_labels(source: PolicySource) -> list[ActionLabels]:
    try:
        known = load_interface(Path(source.place), source.preset, source.unnorm_key)
    except QvlaError:
        return []  # a family that says of itself what an OFT checkpoint does not
    name = "the checkpoint" if source.preset is None else f"preset {source.preset}"
    units = (known.action_unit_mm, known.action_unit_deg)
    return [ActionLabels(name, known.action_names, *units)]


def _judged(
    request: RecommendationRequest,
    space: ActionSpace,
    processor: "Processor",
    demonstrations: "Demonstrations | None",
) -> tuple[Actions, list[Candidate], dict[str, NDArray[np.float64]]]:
    """Return what is compared, every setting judged, and every setting's actions."""
    run, unnormalize = request.run, processor.statistics.action.unnormalize
    times = _measured_times(run)
    actions: Actions | None = None
    candidates: list[Candidate] = []
    answers: dict[str, NDArray[np.float64]] = {}
    for setting in request.settings:
        bundle = Bundle.load(require_artifact(run.bundle(setting), "deploy"))
        path = require_artifact(run.held_out_actions(setting), "deploy")
        stored = HeldOutActions.load(path)
        what = f"bundle and held-out actions {setting.name}"
        require_same(what, bundle.digest, stored.bundle_digest, _REMEDY)
        if actions is None:
            plain = unnormalize(stored.full_precision)
            relative = processor.spec.joints.relative
            target = None if relative else _demonstrated(demonstrations, plain.shape)
            actions = Actions(plain, target, processor.statistics.action.scale())
        answers[setting.name] = unnormalize(stored.engine)
        candidate = Candidate(
            setting.name,
            setting.kind == "float",
            bundle.digest,
            bundle.nbytes,
            open_loop_error(space, actions, answers[setting.name]),
            times.get(setting.name),
        )
        candidates.append(candidate)
    if actions is None:
        raise QvlaError("a recommendation needs at least one setting, got none")
    if not times:
        candidates = _predicted_times(request, candidates)
    return actions, candidates, answers


def _demonstrated(
    demonstrations: "Demonstrations | None", shape: tuple[int, ...]
) -> NDArray[np.float64] | None:
    """Return the demonstrated actions in the shape of the policy's, NaN where there are none."""
    if demonstrations is None or demonstrations.actions.shape[-1] != shape[-1]:
        return None
    target = np.full(shape, np.nan)
    steps = min(shape[1], demonstrations.actions.shape[1])
    target[:, :steps] = demonstrations.actions[:, :steps]
    return target


def _no_actions(demonstrations: "Demonstrations | None", processor: "Processor") -> str:
    dim = processor.spec.action_dim
    if processor.spec.joints.relative:
        return "the policy's actions are differences to the state, demonstrated ones are not"
    if demonstrations is None:
        return "the held-out observations have no demonstrated actions"
    if demonstrations.actions.shape[-1] != dim:
        return (
            f"the recording's actions have {demonstrations.actions.shape[-1]} numbers, the "
            f"policy's {dim}"
        )
    return "no held-out observation has a demonstrated action"


def _measured_times(run: RunFolder) -> dict[str, ActionTime]:
    from jetson.latency.comparison import LatencyComparison

    if not run.latency.is_file():
        return {}
    return {
        profile.name: ActionTime(ms, True, "on this machine", ms, ms)
        for profile in LatencyComparison.load(run.latency).profiles
        for ms in (profile.percentile_ms(50),)
    }


def _predicted_times(
    request: RecommendationRequest, candidates: Sequence[Candidate]
) -> list[Candidate]:
    """Return the candidates with what the target's roofline predicts, where it has one."""
    from engines.targets import find_target
    from qvla_export.pipeline.predict import Device, predict_action
    from qvla_export.pipeline.sizing.subject import subject_of_bundle

    target = find_target(request.target)
    if not target.power_modes:
        return list(candidates)
    places = {setting.name: request.run.bundle(setting) for setting in request.settings}
    times: dict[str, ActionTime] = {}
    for candidate in candidates:
        if candidate.is_float:
            continue
        device = Device(target, target.power_modes[0].name, None)
        report = predict_action(subject_of_bundle(places[candidate.setting]), device)
        for row in report.rows:
            if row.form not in ("float", report.today):
                continue
            where = f"on {target.name} in power mode {row.power_mode} (a roofline, not measured)"
            name = candidate.setting if row.weights == "plan" else "float"
            times[name] = ActionTime(row.ms, False, where, row.low_ms, row.high_ms)
    return [replace(c, time=times.get("float" if c.is_float else c.setting)) for c in candidates]


def _commands(
    request: RecommendationRequest, target: "Target", chosen: Candidate | None, native: bool
) -> tuple[NextCommand, ...]:
    if chosen is None:
        return ()
    bundle = next(request.run.bundle(s) for s in request.settings if s.name == chosen.setting)
    return next_commands(target, chosen.setting, bundle, native)

"""Every step in order, from a checkpoint to a report."""

from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline import evaluate as judging
from qvla_export.pipeline.activations import activations
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate, load_calibration
from qvla_export.pipeline.deployment.kept_layers import kept_layers
from qvla_export.pipeline.deployment.rows import DeployedSetting, deployed_settings
from qvla_export.pipeline.plan import PlanOptions
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.progress import NumberedSteps, OnProgress, finish, ignore
from qvla_export.pipeline.quantize import quantize_setting
from qvla_export.pipeline.recommend.bounds import require_units
from qvla_export.pipeline.recommend.recommend import (
    RecommendationRequest,
    labels_before,
    recommend,
    space_of,
)
from qvla_export.pipeline.recommend.recommendation import Recommendation
from qvla_export.pipeline.recommend.tolerance import USUAL_TOLERANCE, Tolerance
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, agreement, sensitivities
from qvla_export.pipeline.sizing.holding import IN_MEMORY, Holding
from qvla_export.quantizer.activations import DEFAULT_METHOD, TOKEN_RANGES, RangeMethod
from qvla_export.shared.artifacts import versions, write_json
from qvla_export.shared.errors import InvalidObservation
from qvla_export.shared.target import ScaleForm

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy
    from qvla_export.sensitivity.agreement import Agreement

_FORMAT = "qvla.deployment/1"


@dataclass(frozen=True)
class Deployment:
    """What to deploy, for what, and how it is judged."""

    run: RunFolder
    source: PolicySource
    settings: tuple[Setting, ...]
    target: str = "cpu"
    # What is measured on and judged by; None for the calibration set that is in the run already.
    calibration: CalibrationRequest | None = None
    # Meta-World tasks of simulated episodes, and episodes of each and of each setting; 0 for none.
    tasks: tuple[str, ...] = ()
    episodes: int = 0
    # (channel, width) pairs compared with exact measurement; 0 for none, None for a minute's.
    check_pairs: int | None = None
    # Actions of each latency profile, and CPU threads of its engine.
    samples: int = 200
    threads: int | None = 1
    seed: int = 0
    # Processes of episodes.
    workers: int = 2
    # Random probes an observation; None takes the whole Jacobian.
    probes: int | None = 4
    # Codes of planned settings.
    quantizer: Literal["nearest", "compensated"] = "compensated"
    # Whether they have zero points, and the levels of their scales.
    zero_points: bool = False
    scales: ScaleForm = "group"
    # How the ranges of their rounded inputs are chosen.
    ranges: RangeMethod = DEFAULT_METHOD
    # Whether the codes of planned settings are tuned together.
    tune_codes: bool = False
    # What asked for it, for the record.
    command: str = ""
    # By what a setting is recommended, and what the user says of the action.
    tolerance: Tolerance = USUAL_TOLERANCE
    # How the policy is held; see `pipeline.sizing.holding.open_held`.
    holding: Holding = IN_MEMORY

    def describe(self) -> str:
        """Say what was found in the policy, and the scales if they are not those of every group."""
        found = self.source.describe()
        if self.scales == "group":
            return found
        return f"{found}\nscales of two levels: 2- and 4-bit codes expand to 8 bits"


@dataclass(frozen=True)
class DeploymentResult:
    """What came of a deployment."""

    run: RunFolder
    rows: tuple[DeployedSetting, ...]
    # The sensitivities beside exact ones; None where none were compared.
    agreement: "Agreement | None"
    # Whether this machine runs the target's engines.
    native: bool
    report: Path
    # The smallest setting under every bound, if there is one.
    recommendation: Recommendation

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla deploy --json` prints."""
        compared = self.agreement
        return {
            "format": _FORMAT,
            "run": str(self.run.root),
            "report": str(self.report),
            "native": self.native,
            "spearman": None if compared is None else compared.spearman,
            "settings": [{**asdict(row), "bundle": str(row.bundle)} for row in self.rows],
            "recommendation": self.recommendation.to_json(with_traces=False),
        }


def deploy(
    request: Deployment, policy: "Policy", on_progress: OnProgress = ignore
) -> DeploymentResult:
    """Run every step; what is up to date is kept.

    Raises:
        QvlaError: data and policy do not fit, an engine drifts from torch, or see the steps.
    """
    from engines.load import runtime_here
    from engines.targets import find_target

    run, target = request.run, find_target(request.target)
    if request.ranges == "token":
        target.require(TOKEN_RANGES)
    native = runtime_here(target) == target.runtime
    check_inputs(request, policy)
    wish = _recommendation_request(request, policy)
    request.holding.require_whole_for(whole_work(request))
    timed = native and request.holding.resident
    steps = NumberedSteps(on_progress, _count_steps(request, timed))
    if request.holding.resident:
        policy.module.to(request.holding.device)
    compared = _measure(request, policy, steps)
    if request.holding.resident:
        policy.module.to("cpu")  # graphs are traced there
    options = PlanOptions(request.ranges, tune_codes=request.tune_codes)
    for setting in request.settings:
        with steps.next(f"{setting.name}: plan, bundle, engine, action error") as hear:
            quantize_setting(run, setting, policy, target, request.holding, options, hear)
    if timed:
        with steps.next("latency, in process and served over HTTP") as hear:
            judging.latency(run, request.settings, request.samples, request.threads, hear)
    if request.episodes:
        with steps.next("episodes in the simulator") as hear:
            _run_episodes(request, hear)
    with steps.next("recommendation and report"):
        recommendation = recommend(wish, policy.processor)
        from qvla_export.report.page import write_report

        page = write_report(run.root)
    return DeploymentResult(
        run, deployed_settings(run, request.settings), compared, native, page, recommendation
    )


def _recommendation_request(request: Deployment, policy: "Policy") -> RecommendationRequest:
    """Return what is recommended from; a tolerance in unknown units is refused here, first."""
    run, source = request.run, request.source
    wish = RecommendationRequest(
        run, request.settings, request.target, source, request.tolerance, request.command
    )
    require_units(
        space_of(wish, policy.processor, labels_before(run, request.calibration)), wish.tolerance
    )
    return wish


def _count_steps(request: Deployment, timed: bool) -> int:
    rounded = any(setting.activation_bits for setting in request.settings)
    parts = (compares_exactly(request), rounded, timed, request.episodes)
    return 3 + len(request.settings) + sum(map(bool, parts))


def compares_exactly(request: Deployment) -> bool:
    """Whether sensitivities are compared with exact ones: part by part, none takes a minute."""
    return request.holding.resident and request.check_pairs != 0


def whole_work(request: Deployment) -> dict[str, bool]:
    """Options that take the whole policy in memory -> whether they are used."""
    rounded = [setting.name for setting in request.settings if setting.activation_bits]
    return {
        f"--settings {','.join(rounded)}": bool(rounded),
        f"--check-pairs {request.check_pairs}": bool(request.check_pairs),
        f"--episodes {request.episodes}": bool(request.episodes),
        "--tune-codes": request.tune_codes,
    }


def _measure(request: Deployment, policy: "Policy", steps: NumberedSteps) -> "Agreement | None":
    """Draw the calibration set and measure on it all that plans need."""
    from engines.targets import find_target
    from qvla_export.report.run_data import estimators_of

    run, compared = request.run, None
    with steps.next("calibration") as hear:
        if request.calibration is None:
            load_calibration(run)
            finish(hear, "calibration", kept=True)
        else:
            calibrate(run, request.calibration, hear)
        _describe(request, policy)
    with steps.next("sensitivities of every channel and width") as hear:
        target = find_target(request.target, request.zero_points, request.scales)
        how = SensitivityRequest(
            quantizer=request.quantizer, probes=request.probes, seed=request.seed
        )
        resources = request.holding.resources()
        measured = sensitivities(run, policy, target, how, resources, hear)
        if request.holding.resident:
            kept_layers(run, policy, target, hear)
        estimators_of(run.root, measured)  # what the report would refuse at the end
    if compares_exactly(request):
        with steps.next("agreement with exact measurement") as hear:
            compared = agreement(run, policy, request.check_pairs, request.seed, hear)
    if any(setting.activation_bits for setting in request.settings):
        with steps.next("activations of every layer") as hear:
            activations(run, policy, on_progress=hear)
    return compared


def check_inputs(request: Deployment, policy: "Policy") -> None:
    """Refuse data and simulator that do not fit the policy, before the first step."""
    from calibration.benchmarks.metaworld.simulator import Simulator
    from calibration.benchmarks.metaworld.tasks import find_task

    data = None if request.calibration is None else request.calibration.dataset
    if data is not None:
        try:
            policy.processor.feeds(data.frame(0, 0).observation)
        except InvalidObservation as error:
            raise InvalidObservation(
                f"{data.root}: {error}; name the data set's columns with "
                "--camera NAME=COLUMN and --state-column"
            ) from error
    if request.tasks:
        with Simulator(find_task(request.tasks[0])) as simulator:
            observation = simulator.reset(0)
        try:
            policy.processor.feeds(observation)
        except InvalidObservation as error:
            raise InvalidObservation(
                f"the simulator does not fit this policy: {error}; an object-state policy takes "
                "--tasks precise, one of another robot --dataset and --episodes 0"
            ) from error


def _run_episodes(request: Deployment, on_progress: OnProgress) -> None:
    from calibration.benchmarks.evaluation import CONTROLS, RolloutConfig

    config = RolloutConfig(request.tasks, request.episodes)
    first = next((s for s in request.settings if s.kind == "float"), request.settings[0])
    jobs = [(setting, config) for setting in request.settings]
    jobs += [(first, replace(config, control=control)) for control in CONTROLS[1:]]
    run, source, workers = request.run, request.source, request.workers
    for setting, episodes in jobs:
        judging.rollouts(run, setting, episodes, source, workers, on_progress)


def _describe(request: Deployment, policy: "Policy") -> None:
    from engines.load import runtime_here
    from engines.targets import find_target
    from jetson.board import read_board_state

    board, target = read_board_state(), find_target(request.target)
    write_json(
        request.run.description,
        {
            "policy": Path(request.source.place).name,
            "policy_digest": policy.digest,
            "target": request.target,
            "settings": [setting.name for setting in request.settings],
            # What the report misses where it is not there.
            "stages": {
                "agreement": compares_exactly(request),
                "episodes": request.episodes > 0,
                "latency": runtime_here(target) == target.runtime and request.holding.resident,
            },
            "command": request.command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "holding": request.holding.to_json(),
            "versions": versions(),
            "machine": {"cpu_model": board.cpu_model, "cores": board.cores},
        },
    )

"""A run folder -> `RunData`, everything the page shows, checked to belong together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qvla_export.quantizer.plan import BitPlan
from qvla_export.report.estimators import ComparedEstimators, read_estimators
from qvla_export.report.measured import (
    ActionError,
    Latency,
    RankAgreement,
    Rollouts,
    damage_named,
    read_action_error,
    read_agreement,
    read_latencies,
    read_object,
    read_rollouts,
)
from qvla_export.report.predicted_errors import (
    PREDICTED_ERROR,
    PredictedError,
    read_predicted_error,
)
from qvla_export.report.recommendation import Recommended, read_recommendation
from qvla_export.report.robots import RobotMeasurement, read_robots
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.artifacts import require_same, sha256_file
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch
from qvla_export.shared.json_documents import is_file_name

_T = TypeVar("_T")

CONTROLS = ("blank-image", "wrong-instruction")
_INFO_FIELDS = (
    *("policy", "policy_digest", "target", "command", "created", "versions", "machine"),
    "settings",
)
_REMEDY = "Run `qvla deploy` on this run folder again."


@dataclass(frozen=True)
class RunInfo:
    """What run.json says."""

    policy: str
    policy_digest: str
    target: str
    command: str
    created: str
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    # Folder names below settings/, in the order shown.
    settings: tuple[str, ...]
    # Of "agreement", "episodes", "latency": whether this run makes them; without what is not known.
    stages: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class SettingResult:
    """One way to store the policy, and what became of its actions."""

    name: str
    bundle_digest: str
    # None for the float policy.
    plan: BitPlan | None
    # Bytes of the bundle's model: graph and weights.
    bundle_bytes: int
    # Bytes of the quantizable layers as they lie in the bundle, scales included.
    layer_bytes: int
    action_error: ActionError | None
    # What was to be expected of the plan; None where nobody cross-validated it.
    predicted_error: PredictedError | None
    rollouts: Rollouts | None
    latency: Latency | None

    @property
    def measured_widths(self) -> bool:
        """Say whether the widths were chosen by sensitivities rather than uniformly."""
        return self.plan is not None and self.plan.sensitivities_digest is not None


@dataclass(frozen=True)
class RunData:
    """Everything a report shows."""

    folder: str
    info: RunInfo
    # What calibration/calibration.json says; None where it is missing.
    calibration: Mapping[str, Any] | None
    sensitivities: Sensitivities
    # Of the layers that no plan quantizes; None where they were not measured.
    kept_layers: Sensitivities | None
    agreement: RankAgreement | None
    # What `qvla estimators` wrote; None where it was not run.
    estimators: ComparedEstimators | None
    settings: tuple[SettingResult, ...]
    # By name, of those in `CONTROLS` that were run.
    controls: Mapping[str, Rollouts]
    # What `qvla deploy` recommends; None where it was not run to its end.
    recommendation: Recommended | None
    # What robots measured of the settings, file by file.
    robots: tuple[RobotMeasurement, ...]
    # Latency profiles of no setting, by name: bundles that were reached through a server.
    other_latencies: Mapping[str, Latency]

    @property
    def float16_bytes(self) -> int:
        """Return the bytes of the quantizable layers' weights in float16."""
        sizes = self.sensitivities.weights_per_channel
        values = self.sensitivities.values
        return 2 * sum(int(v.shape[1]) * sizes[name] for name, v in values.items())

    @property
    def float_setting(self) -> SettingResult | None:
        """Return the first setting without a plan, if there is one."""
        return next((s for s in self.settings if s.plan is None), None)


def read_run(run: Path) -> RunData:
    """Read a run folder.

    Raises:
        ArtifactError: a required artifact is missing, or any of them is damaged.
        ArtifactMismatch: two of them do not belong together.
    """
    if not run.is_dir():
        raise ArtifactError(f"run folder not found: {run}; `qvla deploy` makes one")
    info = _read_info(run / "run.json")
    sensitivities = Sensitivities.load(run / "sensitivities.safetensors")
    _require("run and sensitivities", info.policy_digest, sensitivities.policy_digest)
    agreement = _if_there(run / "agreement.json", read_agreement)
    if agreement is not None:
        made_for = agreement.sensitivities_digest
        _require("agreement and sensitivities", made_for, sensitivities.digest)
    kept = _if_there(run / "kept_layers.safetensors", Sensitivities.load)
    if kept is not None:
        _require("run and kept_layers", info.policy_digest, kept.policy_digest)
        measured_on = sensitivities.calibration_digest
        _require("sensitivities and kept_layers", measured_on, kept.calibration_digest)
    latencies = _if_there(run / "latency.json", read_latencies) or {}
    settings = tuple(
        _read_setting(run / "settings" / name, info, sensitivities, latencies.get(name))
        for name in info.settings
    )
    controls = {
        name: rollouts
        for name in CONTROLS
        if (rollouts := _if_there(run / "controls" / f"{name}.json", read_rollouts)) is not None
    }
    _require_judged_alike(info, settings, controls)
    return RunData(
        folder=str(run),
        info=info,
        calibration=_read_calibration(run / "calibration" / "calibration.json", sensitivities),
        sensitivities=sensitivities,
        kept_layers=kept,
        agreement=agreement,
        estimators=estimators_of(run, sensitivities),
        settings=settings,
        controls=controls,
        recommendation=_read_recommended(run / "recommendation.json", settings, sensitivities),
        robots=read_robots(run),
        other_latencies={n: v for n, v in latencies.items() if n not in info.settings},
    )


def _read_recommended(
    path: Path, settings: Sequence[SettingResult], sensitivities: Sensitivities
) -> Recommended | None:
    chosen = _if_there(path, read_recommendation)
    if chosen is not None:
        made_for = sensitivities.calibration_digest
        _require("recommendation and calibration set", made_for, chosen.calibration_digest)
        for setting in settings:
            digest = chosen.bundles.get(setting.name, setting.bundle_digest)
            what = f"recommendation and bundle {setting.name}"
            _require(what, setting.bundle_digest, digest)
    return chosen


def estimators_of(run: Path, sensitivities: Sensitivities) -> ComparedEstimators | None:
    """Return the comparison of estimators that lies in a run folder, if one does.

    Raises:
        ArtifactError: it is damaged.
        ArtifactMismatch: it is of another policy or calibration set than the sensitivities.
    """
    compared = _if_there(run / "estimators.json", read_estimators)
    if compared is not None:
        again = "Run `qvla estimators` on this run folder again, or remove its estimators.json."
        measured_on = (sensitivities.policy_digest, sensitivities.calibration_digest)
        compared_on = (compared.policy_digest, compared.calibration_digest)
        for what, ours, theirs in zip(
            ("policy", "calibration set"), measured_on, compared_on, strict=True
        ):
            require_same(f"{what} of sensitivities and estimators", ours, theirs, again)
    return compared


def _require_judged_alike(
    info: RunInfo, settings: Sequence[SettingResult], controls: Mapping[str, Rollouts]
) -> None:
    """Refuse success rates of other policies, or of other episodes, side by side."""
    known = {info.policy_digest, *(setting.bundle_digest for setting in settings)}
    for name, control in controls.items():
        if control.digest not in known:
            raise ArtifactMismatch(
                f"control {name} is of another policy ({control.digest[:16]}) than this run's; "
                "remove it, `qvla deploy` makes it again"
            )
    judged = {s.name: s.rollouts.episodes for s in settings if s.rollouts is not None}
    judged |= {name: control.episodes for name, control in controls.items()}
    if len(set(judged.values())) > 1:
        raise ArtifactMismatch(
            f"evaluations must be of the same episodes (count, seed, execute), got {judged}; "
            "`qvla deploy` runs what differs again"
        )


def _read_info(path: Path) -> RunInfo:
    value = read_object(path, "run description", _INFO_FIELDS)
    with damage_named(path, "run description"):
        # Runs described before stages were do not have them.
        stages = {str(k): v is True for k, v in dict(value.get("stages", {})).items()}
        settings = tuple(value["settings"])
        info = RunInfo(
            policy=str(value["policy"]),
            policy_digest=str(value["policy_digest"]),
            target=str(value["target"]),
            command=str(value["command"]),
            created=str(value["created"]),
            versions=_texts(value["versions"]),
            machine=_texts(value["machine"]),
            settings=settings,
            stages=stages,
        )
    for name in settings:
        if not isinstance(name, str) or not is_file_name(name):
            raise ArtifactError(
                f"{path}: a setting must be the name of a folder, got {name!r:.200}"
            )
    if not settings or len(set(settings)) != len(settings):
        raise ArtifactError(f"{path} must list settings, none twice; {_REMEDY}")
    return info


def _texts(table: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in table.items()}


def _read_calibration(path: Path, sensitivities: Sensitivities) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    value = read_object(path, "calibration set", ("digest", "calibration", "held_out", "source"))
    made_for = sensitivities.calibration_digest
    _require("sensitivities and calibration set", made_for, str(value["digest"]))
    return value


def _read_setting(
    folder: Path, info: RunInfo, sensitivities: Sensitivities, latency: Latency | None
) -> SettingResult:
    with damage_named(folder / "bundle", "bundle"):
        bundle = Bundle.load(folder / "bundle")
        parts = {str(part): int(count) for part, count in bundle.weight_bytes.items()}
    _require(f"run and bundle {folder.name}", info.policy_digest, bundle.policy_digest)
    plan = _read_plan(folder / "plan.json", bundle, sensitivities)
    error = _if_there(folder / "action_error.json", read_action_error)
    for what, made_for in (("action error", error), ("latency", latency)):
        if made_for is not None:
            _require(f"{what} and bundle {folder.name}", made_for.bundle_digest, bundle.digest)
    predicted = _if_there(folder / PREDICTED_ERROR, read_predicted_error)
    if predicted is not None:
        planned = "that of no plan" if plan is None else plan.digest
        again = f"Run `qvla round --cross-validate` again, or remove {folder / PREDICTED_ERROR}."
        what = f"plan and predicted error of {folder.name}"
        require_same(what, planned, predicted.plan_digest, again)
    rollouts = _if_there(folder / "evaluation.json", read_rollouts)
    if rollouts is not None and rollouts.digest not in (bundle.digest, bundle.policy_digest):
        _require(f"evaluation and bundle {folder.name}", rollouts.digest, bundle.digest)
    return SettingResult(
        bundle_digest=bundle.digest,
        name=folder.name,
        plan=plan,
        bundle_bytes=bundle.nbytes,
        layer_bytes=sum(count for part, count in parts.items() if part != "rest"),
        action_error=error,
        predicted_error=predicted,
        rollouts=rollouts,
        latency=latency,
    )


def _read_plan(path: Path, bundle: Bundle, sensitivities: Sensitivities) -> BitPlan | None:
    if bundle.plan is None:
        if path.exists():
            raise ArtifactMismatch(f"{path} lies beside the bundle of a float policy. {_REMEDY}")
        return None
    with damage_named(path, "bit plan"):
        plan = BitPlan.load(path)
        shipped = str(bundle.plan["digest"])
    _require(f"bundle and plan {path.parent.name}", shipped, sha256_file(path))
    sizes = sensitivities.weights_per_channel
    shapes = {name: (v.shape[1], sizes[name]) for name, v in sensitivities.values.items()}
    plan.require_fits(shapes, sensitivities.policy_digest)
    if plan.sensitivities_digest is not None:
        _require("plan and sensitivities", plan.sensitivities_digest, sensitivities.digest)
    return plan


def _if_there(path: Path, read: Callable[[Path], _T]) -> _T | None:
    return read(path) if path.exists() else None


def _require(what: str, expected: str, got: str) -> None:
    require_same(what, expected, got, _REMEDY)

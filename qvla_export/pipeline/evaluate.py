"""The stages that judge a run's bundles: action error, closed-loop success, latency."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from rich.progress import Progress

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.fake_quantized import error_figures
from qvla_export.pipeline.plan import bar, kept_artifact, load_plan, require_calibration
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.run_folder import RunFolder, made
from qvla_export.pipeline.verify import held_out_reference
from qvla_export.shared.artifacts import read_json, require_same, write_json

Weights = Literal["packed", "unpacked"]

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Evaluation, RolloutConfig
    from jetson.latency.comparison import LatencyComparison
    from qvla_export.policies.base import Policy
    from qvla_export.shared.bundle import Bundle


def action_error(run: RunFolder, setting: Setting, policy: "Policy") -> dict[str, Any]:
    """Compare a bundle's engine with the float policy on the held-out observations.

    Raises:
        VerificationError: the engine's drift from torch with the same fake-quantized weights
            exceeds a threshold, see `engines.thresholds`.
    """
    from calibration.calibration_set import CalibrationSet
    from engines.load import load_engine, runtime_here
    from engines.targets import find_target
    from engines.verify import verify

    bundle, path = load_bundle(run, setting), run.action_error(setting)
    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    planned = load_plan(run, setting)
    require_same("bundle and policy", bundle.policy_digest, policy.digest, "Export it again.")
    if planned is not None and planned.calibration_digest is not None:
        require_calibration(calibration, planned.calibration_digest, "plan")
    runtime = runtime_here(find_target(bundle.target))
    identity = {
        "setting": setting.name,
        "bundle_digest": bundle.digest,
        "calibration_digest": calibration.digest,
        "runtime": runtime,
    }
    kept = kept_artifact(path, lambda p: read_json(p, "action error"))
    if kept is not None and all(kept.get(name) == value for name, value in identity.items()):
        return dict(kept)
    reference = held_out_reference(bundle, policy, planned, calibration.held_out)
    with load_engine(bundle, runtime=runtime) as engine:
        verdict = verify(bundle, engine, reference)
    error = verdict.action_error
    assert error is not None
    _, horizon, dimensions = reference.actions.shape
    value = {
        **identity,
        **error_figures(error, horizon * dimensions),
        "engine_drift_max": verdict.drift.worst,
    }
    write_json(path, value)
    return value


def rollouts(
    run: RunFolder, setting: Setting, config: "RolloutConfig", source: PolicySource, workers: int
) -> "Evaluation":
    """Run a bundle closed loop beside the float policy of `source`; or its float control."""
    from calibration.benchmarks.evaluation import load_evaluation
    from calibration.benchmarks.rollouts import evaluate
    from engines.load import runtime_here
    from engines.targets import find_target

    path = run.evaluation(setting) if config.control == "none" else run.control(config.control)
    bundle = load_bundle(run, setting)
    kept = kept_artifact(path, load_evaluation)
    if kept is not None and (kept.digest, kept.config) == (bundle.digest, config.runnable()):
        # A kill between writing the result and removing its journal leaves the journal.
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
        return kept
    name = setting.name if config.control == "none" else f"{setting.name}, {config.control}"
    return evaluate(
        name,
        bundle.digest,
        PolicySource(str(bundle.path), threads=1, runtime=runtime_here(find_target(bundle.target))),
        config,
        path,
        reference=None if config.control != "none" else source,
        workers=workers,
        reference_digest=bundle.policy_digest,
    )


def latency(
    run: RunFolder, settings: Sequence[Setting], samples: int, threads: int | None
) -> "LatencyComparison":
    """Profile all bundles interleaved; the first is the baseline.

    Planned ones are measured with packed weights and with weights unpacked at load, the last of
    them also over real HTTP.
    """
    from calibration.calibration_set import CalibrationSet
    from engines.load import load_engine
    from jetson.latency.comparison import LatencyComparison
    from jetson.latency.measure import profile_latency
    from jetson.policy import EnginePolicy
    from jetson.server import open_server
    from jetson.server_settings import ServerSettings

    bundles = {setting.name: load_bundle(run, setting) for setting in settings}
    threads_ = "all cores" if threads is None else f"{threads} threads"
    # Baselines are not what one would serve, unless there is nothing else.
    served = [*bundles, *(s.name for s in settings if s.kind != "uniform")][-1]
    planned = [setting.name for setting in settings if setting.kind == "planned"]
    engines: list[tuple[str, Bundle, Weights]] = [(n, b, "packed") for n, b in bundles.items()]
    engines += [(f"{n} unpacked", bundles[n], "unpacked") for n in planned]
    names = {**{name: bundle.digest for name, bundle, _ in engines}, f"{served} served": ""}
    conditions = {name: f"{threads_}, {weights}" for name, _, weights in engines}
    kept = kept_artifact(run.latency, LatencyComparison.load)
    if kept is not None and _same_profiles(kept, names, samples, conditions):
        return kept
    observations = CalibrationSet.load(made(run.calibration, "calibrate")).held_out
    policies: dict[str, Any] = {}
    load_ms: dict[str, float] = {}
    with ExitStack() as stack, Progress() as progress:
        for name, bundle, weights in engines:
            start = time.perf_counter()
            engine = stack.enter_context(load_engine(bundle, threads, weights))
            load_ms[name] = (time.perf_counter() - start) * 1e3
            policies[name] = EnginePolicy(bundle, engine)
        settings_ = ServerSettings(port=0)
        policies[f"{served} served"] = stack.enter_context(
            open_server(policies[served], settings_, warmup=observations[0])
        )
        compared = profile_latency(
            policies,
            observations,
            samples=samples,
            progress=bar(progress, "latency"),
            load_ms=load_ms,
            conditions=conditions,
        )
    compared.save(run.latency)
    return compared


def load_bundle(run: RunFolder, setting: Setting) -> "Bundle":
    """Read and verify a setting's bundle.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    from qvla_export.shared.bundle import Bundle

    return Bundle.load(made(run.bundle(setting), f"export --setting {setting.name}"))


def _same_profiles(
    kept: "LatencyComparison",
    digests: Mapping[str, str],
    samples: int,
    conditions: Mapping[str, str],
) -> bool:
    found = {profile.name: profile for profile in kept.profiles}
    if set(found) != set(digests):
        return False
    counts = {len(profile.samples_ms["total"]) for profile in kept.profiles}
    if any(found[name].conditions != condition for name, condition in conditions.items()):
        return False
    return counts == {samples} and all(
        not digest or found[name].bundle_digest == digest for name, digest in digests.items()
    )

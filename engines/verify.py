"""The noun `Verdict`: does an engine act as it must on given observations, by which figures."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine, EngineError, Feeds, rounds_activations, rounds_in_kernels
from engines.chunk_motion import ChunkMotion, chunk_motion
from engines.drift import ActionDrift, action_drift
from engines.targets import find_target
from engines.thresholds import Thresholds, thresholds_for
from qvla_export.shared.artifacts import require_same
from qvla_export.shared.bundle import Bundle, Golden

_LOGGER = logging.getLogger(__name__)


class VerificationError(EngineError):
    """An engine does not reproduce the actions it must."""


@dataclass(frozen=True)
class EngineIdentity:
    """What ran."""

    bundle_digest: str
    target: str
    # Runtime and version.
    runtime: str


@dataclass(frozen=True)
class Reference:
    """Actions an engine must reproduce, on which observations, and how closely."""

    # Whose actions: "torch", or a runtime and bundle.
    source: str
    # "golden" or "held-out".
    observations: str
    # Named model inputs of each observation, batch size 1.
    feeds: tuple[Feeds, ...]
    # Normalized.  float32 [n, horizon, dim]
    actions: NDArray[np.float32]
    # The full-precision policy's in torch, where known.  float32 [n, horizon, dim]
    full_precision: NDArray[np.float32] | None
    thresholds: Thresholds


@dataclass(frozen=True)
class Verdict:
    """An engine's figures against its thresholds."""

    engine: EngineIdentity
    # What the engine was compared with.
    against: str
    observations: str
    # SHA-256 of the model inputs.
    observations_digest: str
    # From the reference: what the engine itself is answerable for.
    drift: ActionDrift
    # From the full-precision policy: plan and engine together; None where not known.
    action_error: ActionDrift | None
    # The reference from the full-precision policy: the plan alone; None where not known.
    plan_error: ActionDrift | None
    # A float engine of the same policy from torch: what no engine of the runtime falls below.
    float_floor: ActionDrift | None
    thresholds: Thresholds
    # What exceeds its threshold, in words; none if the engine is good.
    breaches: tuple[str, ...]
    # How smooth the engine's chunks are, and the full-precision policy's; the reference's where
    # those are not known.
    motion: ChunkMotion
    reference_motion: ChunkMotion
    # What the engine answered, normalized.  float32 [n, horizon, dim]
    actions: NDArray[np.float32] = field(repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether every figure is within its threshold."""
        return not self.breaches

    def require_passed(self) -> None:
        """Refuse a bad engine.

        Raises:
            VerificationError: dimension, figure, what is allowed and the remedy.
        """
        if not self.breaches:
            return
        raise VerificationError(
            f"{self.engine.runtime} differs from {self.against} on {self.drift.observations} "
            f"{self.observations} observations: {'; '.join(self.breaches)} "
            f"({self.thresholds.reason}). Do not use this engine: build it anew with the runtime "
            "version its bundle was made with, or export the bundle anew; "
            "qvla verify --runtime ort tells whether the bundle or the engine is wrong"
        )

    def to_json(self) -> dict[str, object]:
        """Return what a report stores."""
        drifts = {
            "drift": self.drift,
            "action_error": self.action_error,
            "plan_error": self.plan_error,
            "float_floor": self.float_floor,
        }
        return {
            "passed": self.passed,
            "breaches": list(self.breaches),
            "engine": asdict(self.engine),
            "against": self.against,
            "observations": self.observations,
            "observations_digest": self.observations_digest,
            "thresholds": self.thresholds.to_json(),
            "motion": asdict(self.motion),
            "reference_motion": asdict(self.reference_motion),
            **{name: None if d is None else d.to_json() for name, d in drifts.items()},
        }


def torch_reference(
    bundle: Bundle, golden: Golden | None = None, observations: str = "golden"
) -> Reference:
    """Return torch's actions with the bundle's weights: the golden ones, or others given."""
    golden = bundle.golden() if golden is None else golden
    thresholds = _thresholds(bundle, _plan_error(bundle, golden))
    return Reference(
        "torch", observations, golden.feeds, golden.reference, golden.full_precision, thresholds
    )


def engine_reference(
    bundle: Bundle,
    other: Bundle,
    engine: Engine,
    feeds: Sequence[Feeds] | None = None,
    observations: str = "golden",
) -> Reference:
    """Return another engine's actions on the bundle's golden observations, or others given.

    Thresholds are those of both engines; see `Thresholds.beyond` for engines of different plans.

    Args:
        bundle: of the engine to judge.
        other, engine: what to compare it with.
        feeds: model inputs of other observations.

    Raises:
        ArtifactMismatch: the bundles are of different policies.
    """
    require_same(
        "the bundles to compare",
        bundle.policy_digest,
        other.policy_digest,
        "Compare bundles of one policy.",
    )
    golden, theirs = bundle.golden(), other.golden()
    errors = (_plan_error(bundle, golden), _plan_error(other, theirs))
    thresholds = _thresholds(bundle, errors[0]).plus(_thresholds(other, errors[1]))
    if _plan_digest(bundle) != _plan_digest(other):
        thresholds = thresholds.beyond(*errors)
    chosen = golden.feeds if feeds is None else tuple(feeds)
    return Reference(
        f"{engine.runtime} (bundle {other.digest[:16]}, {other.target})",
        observations,
        chosen,
        run_engine(engine, chosen),
        golden.full_precision if feeds is None else None,
        thresholds,
    )


def judge(
    bundle: Bundle,
    engine: Engine,
    reference: Reference | None = None,
    float_floor: ActionDrift | None = None,
) -> Verdict:
    """Compare an engine with a reference; without one, with torch on the golden observations.

    Args:
        bundle: what the engine was made from.
        engine: of any runtime.
        reference: from `torch_reference` or `engine_reference`.
        float_floor: the drift of a float engine of the same policy; a float bundle's own if None.

    Raises:
        EngineError: an action is not finite.
    """
    reference = torch_reference(bundle) if reference is None else reference
    actions = run_engine(engine, reference.feeds)
    drift = _drift(bundle, reference.actions, actions)
    error = plan_error = None
    if reference.full_precision is not None:
        error = _drift(bundle, reference.full_precision, actions)
        plan_error = _drift(bundle, reference.full_precision, reference.actions)
    if float_floor is None and bundle.plan is None:
        float_floor = error
    known, bounds = reference.full_precision, bundle.processor.statistics.action
    return Verdict(
        EngineIdentity(bundle.digest, bundle.target, engine.runtime),
        reference.source,
        reference.observations,
        feeds_digest(reference.feeds),
        drift,
        error,
        plan_error,
        float_floor,
        reference.thresholds,
        reference.thresholds.breaches(drift),
        chunk_motion(actions, bounds),
        chunk_motion(reference.actions if known is None else known, bounds),
        actions,
    )


def verify(bundle: Bundle, engine: Engine, reference: Reference | None = None) -> Verdict:
    """Judge an engine and refuse a bad one; see `judge`.

    Raises:
        VerificationError: a figure exceeds its threshold.
    """
    verdict = judge(bundle, engine, reference)
    verdict.require_passed()
    _LOGGER.info(
        "verified: max |difference| %.1e, cosine %.7f", verdict.drift.worst, verdict.drift.cosine
    )
    return verdict


def float_drift(bundle: Bundle, engine: Engine, reference: Reference) -> ActionDrift:
    """Return a float engine's drift from torch in full precision: the floor of a runtime.

    Raises:
        VerificationError: the bundle is quantized, or torch's actions are not known.
    """
    if bundle.plan is not None:
        raise VerificationError(f"the floor is a float bundle's, {bundle.path} is quantized")
    if reference.full_precision is None:
        raise VerificationError(
            "the floor needs torch's full-precision actions, which another engine on held-out "
            "observations does not have; compare with a checkpoint or on the golden observations"
        )
    return _drift(bundle, reference.full_precision, run_engine(engine, reference.feeds))


def run_engine(engine: Engine, feeds: Sequence[Feeds]) -> NDArray[np.float32]:
    """Return normalized actions, one observation at a time.  float32 [n, horizon, dim]"""
    return np.concatenate([engine.infer(inputs)["actions"] for inputs in feeds])


def feeds_digest(feeds: Sequence[Mapping[str, NDArray[np.generic]]]) -> str:
    """Return the SHA-256 over names, shapes, types and bytes of model inputs, in order."""
    digest = hashlib.sha256()
    for inputs in feeds:
        for name in sorted(inputs):
            value = np.ascontiguousarray(inputs[name])
            digest.update(f"{name} {value.dtype} {value.shape}\0".encode() + value.tobytes())
    return digest.hexdigest()


def _drift(
    bundle: Bundle, reference: NDArray[np.float32], actions: NDArray[np.float32]
) -> ActionDrift:
    processor = bundle.processor
    unit = processor.statistics.action.scale()
    return action_drift(reference, actions, unit, processor.spec.action_bins)


def _plan_error(bundle: Bundle, golden: Golden) -> ActionDrift:
    return _drift(bundle, golden.full_precision, golden.reference)


def _thresholds(bundle: Bundle, plan_error: ActionDrift) -> Thresholds:
    planned = bundle.plan is not None
    return thresholds_for(
        find_target(bundle.target).compute,
        plan_error if planned else None,
        plan_error,
        rounds_activations(bundle) or rounds_in_kernels(bundle),
    )


def _plan_digest(bundle: Bundle) -> str | None:
    return None if bundle.plan is None else str(bundle.plan["digest"])

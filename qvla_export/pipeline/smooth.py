"""The step that smooths a checkpoint: outliers of inputs go into the weights before them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.calibrate import load_calibration
from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from calibration.calibration_set import CalibrationSet
    from qvla_export.policies.base import Policy
    from qvla_export.policies.smoothing import Migration

# 0 would move everything to the inputs, 1 to the weights.
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class SmoothingTrial:
    """What one strength does to the actions."""

    # None: the policy as it was.
    strength: float | None
    # Root mean square, normalized, at uniform 8-bit weights and inputs.
    action_error: float


@dataclass(frozen=True)
class SmoothedCheckpoint:
    """An equal checkpoint whose layers are fed no outliers."""

    path: Path
    strength: float
    trials: tuple[SmoothingTrial, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "path": str(self.path)}


def smooth_checkpoint(
    run: RunFolder,
    source: PolicySource,
    output: Path,
    target: Target,
    strengths: Sequence[float] = STRENGTHS,
    powers_of_two: bool = False,
    on_progress: OnProgress = ignore,
) -> SmoothedCheckpoint:
    """Write a checkpoint that acts as before, smoothed by the strength of least action error.

    Args:
        run: has a calibration set.
        source: the checkpoint.
        output: checkpoint folder to write.
        target: whose 8-bit containers strengths are compared at.
        strengths: shares of outliers moved into the weights, each in [0, 1].
        powers_of_two: scale by powers of two, so that the checkpoint keeps its types and acts bit
            for bit as before; else scaled weights are stored in float32.
        on_progress: hears of every strength.

    Raises:
        QvlaError: checkpoint or calibration set cannot be read, or a strength is out of range.
    """
    from qvla_export.policies.families import recognize
    from qvla_export.policies.smoothing import smoothed_tensors

    checkpoint = Path(source.place)
    policy = open_checkpoint(checkpoint, source.unnorm_key, source.preset)
    calibration = load_calibration(run)
    tell, total = bar(on_progress, "smoothing"), len(strengths) + 1
    tried: list[tuple[SmoothingTrial, dict[Migration, Tensor]]] = []
    for trial, factors in _trials(policy, calibration, target, strengths, powers_of_two):
        tried.append((trial, factors))
        tell(len(tried), total)
    best, factors = min(tried[1:], key=lambda pair: pair[0].action_error)
    assert best.strength is not None
    tensors = smoothed_tensors(policy.module, factors)
    recognize(checkpoint).write_smoothed(checkpoint, output, tensors, keep_types=powers_of_two)
    return SmoothedCheckpoint(output, best.strength, tuple(trial for trial, _ in tried))


def _trials(
    policy: "Policy",
    calibration: "CalibrationSet",
    target: Target,
    strengths: Sequence[float],
    powers_of_two: bool,
) -> "Iterator[tuple[SmoothingTrial, dict[Migration, Tensor]]]":
    """Yield error and factors of the policy as it was, then of every strength."""
    from qvla_export.measurement.smoothing import input_maxima, smoothing_error
    from qvla_export.policies.smoothing import smoothing_factors

    observations, migrations = calibration.observations, policy.migrations()
    maxima = input_maxima(policy, observations)
    for strength in (None, *strengths):
        factors: dict[Migration, Tensor] = {}
        if strength is not None:
            factors = smoothing_factors(policy.module, migrations, maxima, strength, powers_of_two)
        error = smoothing_error(policy, factors, observations, calibration.digest, target)
        yield SmoothingTrial(strength, error), factors

"""The step that measures the layers that no plan quantizes, so that a report can say what for."""

from typing import TYPE_CHECKING

from qvla_export.pipeline.calibrate import load_calibration
from qvla_export.pipeline.progress import OnProgress, bar, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current
from qvla_export.pipeline.work.log import ArtifactWork, Value, recorded_work, short
from qvla_export.quantizer.quantize import spec_for
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy
    from qvla_export.sensitivity.estimators.first_order import FirstOrder

# A layer's sum is told from another's by these, at a fraction of what all layers take.
KEPT_OBSERVATIONS = 16
_WIDTHS = (2, 4, 8)


def kept_layers(
    run: RunFolder, policy: "Policy", target: Target, on_progress: OnProgress = ignore
) -> Sensitivities | None:
    """Estimate what the nearest codes would do to the layers that stay in 16 bits, or keep that.

    First order, 4 probes, the first observations of the calibration set.

    Args:
        run: has a calibration set.
        policy: its weights in memory.
        target: its quantizer is asked.
        on_progress: hears of every batch.

    Returns:
        None where the policy has no such layer, or its weights were left on disk.
    """
    from qvla_export.policies.layers import weights_on_disk
    from qvla_export.sensitivity.estimators.first_order import measure_first_order

    if weights_on_disk(policy) or not policy.kept_layers():
        return None
    calibration, path = load_calibration(run), run.kept_layers
    settings = kept_question(target)
    seen, work = (
        calibration.observations[:KEPT_OBSERVATIONS],
        "sensitivities of what stays in 16 bits",
    )
    made_from = (policy.digest, calibration.digest, settings.quantizer, len(seen))
    earlier = load_if_current(
        path,
        Sensitivities.load,
        lambda old: (
            (old.policy_digest, old.calibration_digest, old.quantizer, old.samples) == made_from
        ),
    )
    if earlier is not None:
        finish(on_progress, work, kept=True)
        return earlier
    options: dict[str, Value] = {
        "--policy": short(policy.digest),
        "calibration set": short(calibration.digest),
        "--target": target.name,
    }
    with recorded_work(ArtifactWork(run, path, options, (run.calibration,)), on_progress) as hear:
        shown = bar(hear, work)
        measured = measure_first_order(
            policy, seen, calibration.digest, settings, on_progress=shown
        )
        measured.save(path)
    finish(on_progress, work, kept=False)
    return measured


def kept_question(target: Target) -> "FirstOrder":
    """Return how the layers that stay in 16 bits are measured."""
    from qvla_export.sensitivity.estimators.first_order import FirstOrder

    return FirstOrder(spec_for(target), _WIDTHS, probes=4, of_kept=True)

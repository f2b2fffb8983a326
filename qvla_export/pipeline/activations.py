"""The step that records what the layers are fed, where settings such as w8a8 take their ranges."""

from typing import TYPE_CHECKING

from qvla_export.pipeline.calibrate import load_calibration
from qvla_export.pipeline.progress import OnProgress, bar, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current
from qvla_export.pipeline.work.log import ArtifactWork, recorded_work, short
from qvla_export.quantizer.activation_statistics import ActivationStatistics

if TYPE_CHECKING:
    from qvla_export.measurement.distributed import World
    from qvla_export.policies.base import Policy

_WORK = "activations"


def activations(
    run: RunFolder,
    policy: "Policy",
    world: "World | None" = None,
    on_progress: OnProgress = ignore,
) -> ActivationStatistics:
    """Record what the layers are fed, or keep what was recorded of the same.

    Processes of one world share the observations; process 0 writes.
    """
    from qvla_export.measurement.distributed import Alone
    from qvla_export.measurement.measure_activations import measure_activations

    world = world or Alone()
    calibration = load_calibration(run)
    recorded = load_if_current(
        run.activations,
        ActivationStatistics.load,
        lambda old: (
            (old.policy_digest, old.calibration_digest) == (policy.digest, calibration.digest)
        ),
    )
    current = world.broadcast(recorded is not None)
    if not current:
        options = {
            "--policy": short(policy.digest),
            "calibration set": short(calibration.digest),
        }
        record = ArtifactWork(run, run.activations, options, (run.calibration,))
        with recorded_work(record, on_progress, world) as hear:
            recorded = measure_activations(
                policy, calibration.observations, calibration.digest, bar(hear, _WORK), world
            )
            if world.rank == 0:
                recorded.save(run.activations)
    finish(on_progress, _WORK, current)
    return recorded or ActivationStatistics.load(run.activations)

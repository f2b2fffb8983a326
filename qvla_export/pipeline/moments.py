"""The step that measures moments: what the layers are fed, and what their outputs are worth."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.pipeline.calibrate import load_calibration
from qvla_export.pipeline.progress import OnProgress, bar, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current
from qvla_export.pipeline.work.log import ArtifactWork, Value, recorded_work, short
from qvla_export.quantizer.moments import Moments

if TYPE_CHECKING:
    from qvla_export.pipeline.resources import Demand, Resources
    from qvla_export.policies.base import Policy
    from qvla_export.policies.layers import Layers


def moments(
    run: RunFolder,
    policy: "Policy",
    resources: "Resources | None" = None,
    largest_block: int | None = None,
    on_progress: OnProgress = ignore,
) -> Moments:
    """Measure what the layers are fed and what their outputs are worth, or keep what is there.

    Processes of one world share the observations; process 0 writes. Of a policy whose weights were
    left on disk, the blocks are the largest that fit into the bound unless told.
    """
    from qvla_export.measurement.measure_moments import measure_moments
    from qvla_export.measurement.moment_bounds import MomentSettings, fitting_block
    from qvla_export.measurement.sharded_sums import remove_journals
    from qvla_export.pipeline.resources import Resources
    from qvla_export.policies.layers import weights_on_disk

    means = resources or Resources()
    world, first = means.world, means.world.rank == 0
    calibration = load_calibration(run)
    observations, digest = calibration.observations, calibration.digest
    bound, journal = means.max_bytes, _journal(run)
    settings = MomentSettings(batch_size=means.batch_size, max_bytes=bound)
    measured = load_if_current(
        run.moments,
        Moments.load,
        lambda old: (
            (old.policy_digest, old.calibration_digest, old.probes, old.seed)
            == (policy.digest, digest, settings.probes, settings.seed)
            and (largest_block is None or old.has_blocks(largest_block))
        ),
    )
    current = world.broadcast(measured is not None)
    work = "moments"
    if not current:
        if largest_block is None and bound is not None and weights_on_disk(policy):
            largest_block = fitting_block(policy, observations, settings, world)
        if largest_block is not None:
            settings = replace(settings, largest_block=largest_block)
        work = f"moments, blocks of {settings.largest_block}"
        options: dict[str, Value] = {
            "--policy": short(policy.digest),
            "calibration set": short(digest),
            "--largest-block": settings.largest_block,
        }
        record = ArtifactWork(run, run.moments, options, (run.calibration,))
        with recorded_work(record, on_progress, world) as hear:
            shown = bar(hear, work)
            measured = measure_moments(
                policy, observations, digest, settings, journal, shown, world
            )
            if first:
                measured.save(run.moments)
    if first:
        remove_journals(journal)
    finish(on_progress, work, current)
    return measured or Moments.load(run.moments)


def moment_demand(largest_block: int | None = None) -> "Demand":
    """Return what measuring moments takes of memory."""
    from qvla_export.measurement.moment_bounds import DEFAULT_MOMENTS, moment_needs, moment_sums
    from qvla_export.pipeline.resources import Demand

    settings = DEFAULT_MOMENTS
    if largest_block is not None:
        settings = replace(settings, largest_block=largest_block)

    def held_of(layers: "Layers") -> int:
        return sum(array.nbytes for array in moment_sums(layers, settings).values())

    return Demand(lambda layers, moved: moment_needs(layers, moved, settings), held_of)


def _journal(run: RunFolder) -> Path:
    return run.moments.with_suffix(".progress")

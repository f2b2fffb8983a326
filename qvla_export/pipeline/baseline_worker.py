"""Runs in the libraries' environment, as `python -m` with a job's file: makes one baseline."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from qvla_export.baselines.baseline import Baseline
from qvla_export.baselines.environment import BaselineJob, block_line, require_library, run_library
from qvla_export.baselines.quantized import Calibration
from qvla_export.shared.errors import QvlaError


def work(job: BaselineJob, tell: Callable[[int, int], None]) -> Baseline:
    """Load the policy and its calibration set, quantize, write the baseline.

    Args:
        job: what to do.
        tell: called with (parts done, parts in all).

    Raises:
        QvlaError: the library is not installed here, or something does not load.
    """
    import torch

    from calibration.calibration_set import CalibrationSet
    from qvla_export.policies.families import load_policy

    libraries = require_library(job.request.method)
    observations = CalibrationSet.load(Path(job.calibration))
    policy = load_policy(Path(job.checkpoint), job.unnorm_key, job.preset)
    torch.manual_seed(job.request.seed)
    started = time.perf_counter()
    quantized = run_library(Calibration(policy, observations.observations, job.request, tell))
    baseline = Baseline(
        request=job.request,
        layers=quantized.layers,
        policy_digest=policy.digest,
        calibration_digest=observations.digest,
        activations=quantized.activations,
        settings=quantized.settings,
        libraries=libraries,
        seconds=time.perf_counter() - started,
    )
    baseline.save(Path(job.output))
    return baseline


def work_apart(job: BaselineJob) -> None:
    """Do the work where another process reads standard output to know how far it is."""

    def tell(done: int, total: int) -> None:
        sys.stdout.write(block_line(job.request.setting, done, total) + "\n")
        sys.stdout.flush()

    work(job, tell)


if __name__ == "__main__":
    try:
        work_apart(BaselineJob.from_json(Path(sys.argv[1]).read_text()))
    except QvlaError as error:
        sys.exit(str(error))

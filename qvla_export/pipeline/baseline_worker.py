"""Runs in the libraries' environment, as `python -m` with a job's file: makes one baseline."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from qvla_export.baselines.baseline import Baseline
from qvla_export.baselines.environment import BaselineJob, require_library, run_library
from qvla_export.baselines.quantized import Calibration
from qvla_export.shared.errors import QvlaError


def work(job: BaselineJob) -> Baseline:
    """Load the policy and its calibration set, quantize, write the baseline.

    Raises:
        QvlaError: the library is not installed here, or something does not load.
    """
    import torch

    from calibration.calibration_set import CalibrationSet
    from qvla_export.policies.families import open_policy

    libraries = require_library(job.request.method)
    observations = CalibrationSet.load(Path(job.calibration))
    policy = open_policy(Path(job.checkpoint), job.unnorm_key, job.preset)
    torch.manual_seed(job.request.seed)
    started = time.perf_counter()
    made = run_library(
        Calibration(policy, observations.observations, job.request, _say(job.request.setting))
    )
    baseline = Baseline(
        request=job.request,
        layers=made.layers,
        policy_digest=policy.digest,
        calibration_digest=observations.digest,
        activations=made.activations,
        settings=made.settings,
        libraries=libraries,
        seconds=time.perf_counter() - started,
    )
    baseline.save(Path(job.output))
    return baseline


def _say(setting: str) -> Callable[[int, int], None]:
    def say(done: int, total: int) -> None:
        print(f"{setting}: block {done} of {total}", flush=True)

    return say


if __name__ == "__main__":
    try:
        work(BaselineJob.from_json(Path(sys.argv[1]).read_text()))
    except QvlaError as error:
        sys.exit(str(error))

"""Records of judgements: which held-out errors and episodes are of what, and what they cost."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.pipeline.action_error import ErrorSubject
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.work.log import ArtifactWork, Value, short

if TYPE_CHECKING:
    from calibration.benchmarks.rollouts import RolloutJob


def error_work(run: RunFolder, path: Path, subject: ErrorSubject, judged: Path) -> ArtifactWork:
    """Return the record of a held-out error; `judged` is the artifact that acts."""
    options: dict[str, Value] = {
        subject.kind: short(subject.digest),
        "calibration set": short(subject.calibration_digest),
        "runtime": subject.runtime,
    }
    return ArtifactWork(run, path, options, (run.calibration, judged))


def rollout_work(run: RunFolder, path: Path, job: "RolloutJob", judged: Path) -> ArtifactWork:
    """Return the record of closed-loop episodes; `judged` is the artifact that acts."""
    config = asdict(job.config)
    options: dict[str, Value] = {
        f"--{name.replace('_', '-')}": value
        if isinstance(value, str | int | float | bool | None)
        else json.dumps(value)
        for name, value in config.items()
    }
    options["policy"] = short(job.digest)
    return ArtifactWork(run, path, options, (judged,))

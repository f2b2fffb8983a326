"""Requests, jobs, and the environment that does them."""

import sys
from pathlib import Path

import pytest

from qvla_export.baselines.environment import BaselineEnvironment, BaselineJob
from qvla_export.baselines.methods import BaselineRequest
from qvla_export.shared.errors import QvlaError


def environment(tmp_path: Path, script: str) -> Path:
    """Return an environment whose Python is a shell script."""
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("method", "bits", "activation_bits", "message"),
    [
        ("magic", 4, None, "must be one of"),
        ("gptq", 5, None, r"run at \[2, 3, 4, 8\] bits, got 5"),
        ("smoothquant", 8, None, "got float"),
        ("awq", 4, 8, r"are \['float'\], got 8"),
    ],
)
def test_requests_that_no_library_takes_are_refused(
    method: str, bits: int, activation_bits: int | None, message: str
) -> None:
    with pytest.raises(QvlaError, match=message):
        BaselineRequest(method, bits, activation_bits)


def test_jobs_are_read_as_they_were() -> None:
    job = BaselineJob(BaselineRequest("auto-round", 2, None, 64), "a", "b", "c", preset="libero")
    assert BaselineJob.from_json(job.to_json()) == job


def test_an_environment_without_the_library_names_the_remedy(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """QVLA's own environment has none of the libraries."""
    folder = environment(tmp_path, f'exec {sys.executable} "$@"')
    job = BaselineJob(
        BaselineRequest("auto-round", 4),
        str(tiny_checkpoint),
        str(tmp_path / "calibration"),
        str(tmp_path / "out"),
    )
    with pytest.raises(QvlaError, match="no auto-round; make it with: make baselines-env"):
        BaselineEnvironment(folder).run(job)


def test_blocks_are_told_and_a_failure_has_the_last_words(tmp_path: Path) -> None:
    lines = (
        "a library's own words",
        "w4-gptq: block 1 of 12",
        "w4-gptq: block 2 of 12",
        "no memory",
    )
    script = "\n".join(f'echo "{line}"' for line in lines)
    folder = environment(tmp_path, f"{script}\nexit 3")
    job = BaselineJob(BaselineRequest("gptq", 4), "checkpoint", "calibration", "output")
    blocks: list[tuple[int, int]] = []
    with pytest.raises(QvlaError, match=r"(?s)w4-gptq failed in .*no memory"):
        BaselineEnvironment(folder).run(job, lambda done, total: blocks.append((done, total)))
    assert blocks == [(1, 12), (2, 12)]

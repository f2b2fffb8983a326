"""`qvla bench gpu`: refused where there is no GPU, every step on a CPU double, whole on a GPU."""

import json
from pathlib import Path

import pytest
import torch
from command_runs import qvla

from qvla_export.pipeline.bench.gpu import bench_gpu

STEPS = 5


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused = qvla("bench", "gpu", "--output", tmp_path / "gpu.json")
    assert "needs an NVIDIA GPU that torch sees" in refused.error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_step_runs_on_a_cpu_double(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    bench = bench_gpu(tiny_checkpoint, output, torch.device("cpu"), target="cpu")
    assert json.loads(output.read_text()) == bench.to_json()
    assert len(bench.steps) == STEPS
    assert all(step.difference == 0 for step in bench.steps)
    page = (tmp_path / "gpu.html").read_text()
    assert all(step.name in page for step in bench.steps) and "://" not in page


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    assert qvla("bench", "gpu", "--output", output).code == 0
    steps = json.loads(output.read_text())["steps"]
    assert len(steps) == STEPS and all(step["difference"] < 0.02 for step in steps)

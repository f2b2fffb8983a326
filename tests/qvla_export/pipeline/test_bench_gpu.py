"""`qvla bench gpu`: refused where there is no GPU, every step on a CPU double, whole on a GPU."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from command_runs import qvla

from engines.bench.kernel_times import contestants, product_times
from qvla_export.pipeline.bench.gpu import bench_gpu

STEPS = 7


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused = qvla("bench", "gpu", "--output", tmp_path / "gpu.json")
    assert "needs an NVIDIA GPU that torch sees" in refused.error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_step_runs_on_a_cpu_double(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    bench = bench_gpu(
        tiny_checkpoint, output, torch.device("cpu"), target="cpu", layers={"small": (128, 256)}
    )
    assert json.loads(output.read_text()) == bench.to_json()
    assert len(bench.steps) == STEPS
    assert all(step.difference == 0 for step in bench.steps)
    assert len(list(bench.lines())) == STEPS + len(bench.products)
    page = (tmp_path / "gpu.html").read_text()
    assert all(step.name in page for step in bench.steps) and "://" not in page


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    assert qvla("bench", "gpu", "--output", output).code == 0
    steps = json.loads(output.read_text())["steps"]
    assert len(steps) == STEPS and all(step["difference"] < 0.02 for step in steps)
    products = json.loads(output.read_text())["products"]
    assert all(
        p["reason"] == "" and p["difference"] < 0.01
        for p in products
        if "kernel" in p["contestant"]
    )


def test_products_are_timed_by_everyone_or_it_is_said_why_not() -> None:
    rows, shape = (1, 20), (128, 256)
    found = list(product_times(torch.device("cpu"), {"small": shape}, rows))
    names = list(contestants(shape, torch.device("cpu")))
    assert [(p.contestant, p.rows) for p in found] == [(n, r) for n in names for r in rows]
    for product in found:
        assert (product.ms is None) == bool(product.reason)
        if product.difference is not None:
            assert product.difference < 0.02
    plain = [product for product in found if "cuBLAS" in product.contestant]
    assert all(product.difference is not None and "ms" in str(product) for product in plain)
    if find_spec("triton") is None:
        assert all("triton" in p.reason for p in found if "kernel" in p.contestant)

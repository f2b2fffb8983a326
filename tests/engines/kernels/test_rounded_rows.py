"""Rows rounded to codes: the numbers of torch's operators, no spills, bad rows refused."""

import pytest
import torch
from interpreter_runs import run_interpreted
from places import ROOT

pytest.importorskip("triton", reason="Triton is 286 MB: make kernels installs it and runs these")

from engines.base import EngineError
from engines.bench.compiled_kernels import ARCHITECTURES, compile_rounding
from engines.kernels.rounding_form import MOST_INPUTS
from engines.kernels.row_rounder import Norm, RowRounder

RESULTS = (ROOT / "docs" / "results.md").read_text()
# Norm, inputs and type of rows of a language model and its towers.
FORMS = (
    ("rms", 4096, "fp32"),
    ("layer", 1024, "fp32"),
    ("none", 4096, "fp16"),
    ("none", 11008, "fp16"),
)


@pytest.mark.parametrize("start", [0, 1])
def test_drawn_rows_become_torchs_codes(start: int) -> None:
    done = run_interpreted("interpreted_rounding.py", 150, start)
    assert int(done.split()[0]) >= 150


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_page_says_what_the_compilers_report(architecture: int) -> None:
    for form in FORMS:
        compiled = compile_rounding(*form, architecture)
        assert compiled.spills == 0
        assert compiled.row() in RESULTS


def test_rows_of_another_layer_are_refused() -> None:
    cpu, step = torch.device("cpu"), torch.tensor(0.1)
    with pytest.raises(EngineError, match=r"must have 64 inputs, got \[2, 63\]"):
        RowRounder(step, 64, None, cpu)(torch.zeros(2, 63))
    with pytest.raises(EngineError, match=f"1 to {MOST_INPUTS} inputs, got {MOST_INPUTS + 1}"):
        RowRounder(step, MOST_INPUTS + 1, None, cpu)
    norm = Norm("rms", torch.ones(63), None, 1e-5, False)
    with pytest.raises(EngineError, match="as many weights and biases"):
        RowRounder(step, 64, norm, cpu)

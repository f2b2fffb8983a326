"""Drawn rows rounded under Triton's interpreter, with norms before; run as a script."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch.nn import functional

from engines.kernels.row_rounder import Norm, RowRounder

CPU = torch.device("cpu")


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    return {
        "rows": draw(st.sampled_from((0, 1, 2, 5))),
        "inputs": draw(st.sampled_from((1, 2, 63, 64, 65, 100, 128, 300))),
        "norm": draw(st.sampled_from((None, None, "rms", "layer"))),
        "halves": draw(st.booleans()),
        "biases": draw(st.booleans()),
        "type": draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        "step": draw(st.sampled_from((1.0, 0.25, 0.01, 1 / 3, 2.0**-20))),
        # Of the drawn numbers; None for the step, so that many lie between two codes.
        "size": draw(st.sampled_from((None, None, None, 0.0, 1e-3, 1.0, 300.0))),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def check(case: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["rows"], 1, case["inputs"])
    size = case["step"] if case["size"] is None else case["size"]
    drawn = torch.randint(-9, 10, shape, generator=generator) * size / 2
    rows, step = drawn.to(case["type"]), torch.tensor(case["step"])
    norm = None
    if case["norm"] is not None:
        weights, biases = torch.randn(2, case["inputs"], generator=generator)
        more = biases if case["biases"] and case["norm"] == "layer" else None
        norm = Norm(case["norm"], weights, more, 1e-5, case["halves"])
    found = RowRounder(step, case["inputs"], norm, CPU)(rows)
    assert found.dtype == torch.int8 and found.shape == rows.shape
    exact = normal(rows.float(), norm) / step
    expected = exact.round().clamp(-128, 127)
    if norm is None:
        assert torch.equal(found, expected.to(torch.int8))
        return
    # Sums of another order: a number near the middle of two codes may become either.
    unsure = exact.abs() * (2**-10 if norm.halves else 2**-16) + lost(rows.float(), norm) / step
    off, middle = (found.float() - expected).abs(), (exact - exact.floor() - 0.5).abs()
    assert bool((off <= 1 + unsure).all())
    assert not bool(off[middle > unsure].any())


def lost(rows: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Bound what float32 loses of rows less their mean, after the norm."""
    largest = rows.abs().amax(-1, keepdim=True)
    spread = rows.var(-1, correction=0, keepdim=True) if norm.kind == "layer" else largest.square()
    return 2**-21 * (1 + largest / (spread + norm.epsilon).sqrt()) * (1 + norm.weights.abs())


def normal(rows: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    if norm is None:
        return rows
    if norm.kind == "layer":
        size = (rows.shape[-1],)
        made = functional.layer_norm(rows, size, norm.weights, norm.biases, norm.epsilon)
    else:
        power = rows.square().mean(-1, keepdim=True)
        made = norm.weights * (rows * (1 / (power + norm.epsilon).sqrt()))
    return made.half().float() if norm.halves else made


if __name__ == "__main__":
    count, start = int(sys.argv[1]), int(sys.argv[2])
    done = []

    @seed(start)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(cases())
    def run(case: dict[str, object]) -> None:
        check(case)
        done.append(case)

    run()
    print(f"{len(done)} roundings right")

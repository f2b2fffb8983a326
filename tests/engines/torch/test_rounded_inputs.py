"""Norms and roundings before launches are one pass over rows, with the numbers of the graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from interpreter_runs import run_interpreted
from normed_layers import normed_layer, up_to_codes
from places import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines.targets import RTX4070
from engines.torch.part_graph import PartGraph

NEEDS_TRITON = "Triton is 286 MB: make kernels installs it and runs these"
RESULTS = " ".join((ROOT / "docs" / "results.md").read_text().split())


class MovedBytes(TorchDispatchMode):
    """Adds up what every operator of torch reads and writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = call(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        places = {t.untyped_storage().data_ptr() for t in tensors}
        if len(places) == len(tensors):
            self.total += sum(t.nbytes for t in tensors)
        return out


@pytest.mark.parametrize(
    ("norm", "nbytes", "words"),
    [
        ("rms", 77, "77 bytes a number behind an RMS norm"),
        ("layer", 57, "57 behind a LayerNorm"),
        ("none", 43, "43 where there is no norm"),
    ],
)
def test_operators_one_by_one_move_what_the_page_says(
    norm: str, nbytes: int, words: str, tmp_path: Path
) -> None:
    target, widths = RTX4070.with_two_level_scales(), np.full(32, 4, np.int8)
    ir.save(up_to_codes(normed_layer(norm, widths, 1024, target)), tmp_path / "codes.onnx")
    graph, rows = (
        PartGraph(tmp_path / "codes.onnx", torch.device("cpu"), False),
        torch.randn(256, 1024),
    )
    with MovedBytes() as moved:
        graph.run({"x": rows[None]})
    # Without a norm the graph's input is made float16 first, which a layer before has done.
    found = moved.total / rows.numel() - (6 if norm == "none" else 0)
    assert round(found) == nbytes
    assert words in RESULTS


def test_a_norm_a_rounding_and_a_layer_are_two_launches_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason=NEEDS_TRITON)
    assert run_interpreted("interpreted_norms.py", timeout_s=300).splitlines() == [
        "none, cpu: None, 0 casts, 0 others",
        "rms, cpu: rms, 0 casts, 0 others",
        "layer, cpu: layer, 0 casts, 0 others",
        "none, rtx4070: None, 2 casts, 0 others",
        "rms, rtx4070: rms, 1 casts, 0 others",
        "layer, rtx4070: layer, 1 casts, 0 others",
    ]

"""Norms, roundings and layers as two launches, under Triton's interpreter; run as a script."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from normed_layers import NORMS, normed_layer

from engines.targets import CPU, RTX4070
from engines.torch.constants import ROUNDED, TILED
from engines.torch.part_graph import PartGraph
from qvla_export.shared.target import Target


def check(norm: str, target: Target, folder: Path) -> str:
    widths = np.repeat([2, 4, 8], 40).astype(np.int8)
    path = folder / f"{norm}_{target.name}.onnx"
    ir.save(normed_layer(norm, widths, 200, target), path)
    graphs = [PartGraph(path, torch.device("cpu"), tiled) for tiled in (True, False)]
    kinds = [node.operator for node in graphs[0].nodes]
    (rounder,) = [n.attributes["rounder"] for n in graphs[0].nodes if n.operator == ROUNDED]
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(2, 7, 200)).astype(np.float32))
    found, expected = (next(iter(graph.run({"x": x}).values())).float() for graph in graphs)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
    names = [kind for kind in kinds if kind in (ROUNDED, TILED, "Cast")]
    rest = len(kinds) - len(names)
    return f"{norm}, {target.name}: {rounder.norm}, {names.count('Cast')} casts, {rest} others"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for target in (CPU, RTX4070):
            for norm in NORMS:
                print(check(norm, target.with_two_level_scales(), Path(folder)))

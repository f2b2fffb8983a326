"""Layers of graphs as launches of the kernel, under Triton's interpreter; run as a script."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from ort_graphs import LAYER, linear_model

from engines.targets import CPU, find_target
from engines.torch.constants import TILED
from engines.torch.part_graph import PartGraph
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.compute_type import to_compute_type
from qvla_export.graph.passes.quantize_activations import quantize_activations
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.quantize import spec_for

CHANNELS, INPUTS = 150, 256


def layer(case: str) -> ir.Model:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(CHANNELS, INPUTS)).astype(np.float32)
    widths = generator.choice([0, 2, 4, 8, 16], CHANNELS).astype(np.int8)
    rounded = case != "halves"
    target = CPU.with_two_level_scales() if case == "expanded" else find_target("cuda")
    model = linear_model(weight, None)
    if rounded:
        ranges = ActivationRanges(8, "max", {LAYER: 2.5})
        model = quantize_activations(model, ranges, target)
    spec = spec_for(target)
    if case != "expanded":
        model = to_compute_type(model, target)
    expanded = rounded and case == "expanded"
    return bucketize(model, {LAYER: widths}, spec, target, rounded_inputs=expanded)


def check(case: str, folder: Path) -> str:
    path = folder / f"{case}.onnx"
    ir.save(layer(case), path)
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 7, INPUTS)).astype(np.float32))
    graphs = [PartGraph(path, torch.device("cpu"), tiled) for tiled in (True, False)]
    launches = [node for node in graphs[0].nodes if node.operator == TILED]
    assert len(launches) == 1, "one launch a layer"
    assert not [node for node in graphs[0].nodes if node.operator == "MatMul"]
    found, expected = (next(iter(graph.run({"x": x}).values())).numpy() for graph in graphs)
    bound = (1e-6 if case == "expanded" else 2e-3) * np.abs(expected).max()
    assert np.abs(found.astype(np.float32) - expected).max() <= bound
    tiled = launches[0].attributes["layer"]
    return f"{case}: {sorted(set(tiled.tile_bits))}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for case in ("expanded", "halves", "rounded halves"):
            print(check(case, Path(folder)))

"""A package with a DINOv2 tower in an ONNX graph as exporters write one, small and random."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qvla_export.policies.prismatic import pretrained
from qvla_export.policies.prismatic.pretrained import DINOV2_SMALL, PretrainedTower
from qvla_export.shared.artifacts import sha256_file

WIDTH, BLOCKS, GRID = 64, 3, 5
# Linear maps of a block, with their lengths: in, out.
_MAPS = {
    "attention.attention.query": (WIDTH, WIDTH),
    "attention.attention.key": (WIDTH, WIDTH),
    "attention.attention.value": (WIDTH, WIDTH),
    "attention.output.dense": (WIDTH, WIDTH),
    "mlp.fc1": (WIDTH, 4 * WIDTH),
    "mlp.fc2": (4 * WIDTH, WIDTH),
}


def install_tiny_tower(folder: Path, patch: pytest.MonkeyPatch) -> PretrainedTower:
    """Write the package into a folder, put it on the path, and make its tower a known one."""
    package = folder / "tiny_dinov2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('nobody needs to run this')\n")
    onnx.save(tower_graph(), str(package / "tower.onnx"))
    tower = replace(
        DINOV2_SMALL,
        package="tiny-tower",
        module="tiny_dinov2",
        file="tower.onnx",
        sha256=sha256_file(package / "tower.onnx"),
        blocks=BLOCKS,
        width=WIDTH,
        heads=2,
    )
    patch.syspath_prepend(folder)
    patch.setattr(pretrained, "_KNOWN", (tower,))
    return tower


def tower_graph() -> onnx.ModelProto:
    """Return a graph in which linear weights have no names of their own, and are transposed."""
    random = np.random.default_rng(0)
    named: dict[str, NDArray[np.float32]] = {}

    def draw(name: str, *shape: int) -> None:
        named[name] = random.normal(0.0, 0.05, shape).astype(np.float32)

    draw("backbone.embeddings.cls_token", 1, 1, WIDTH)
    draw("backbone.embeddings.patch_embeddings.projection.weight", WIDTH, 3, 14, 14)
    draw("backbone.embeddings.patch_embeddings.projection.bias", WIDTH)
    draw("onnx::Concat_1", 1, 1, WIDTH)
    draw("onnx::Reshape_2", 1, GRID * GRID, WIDTH)
    nodes = []
    for block in range(BLOCKS):
        stem = f"backbone.encoder.layer.{block}."
        for name in ("norm1", "norm2"):
            named[f"{stem}{name}.weight"] = np.ones(WIDTH, np.float32)
            draw(f"{stem}{name}.bias", WIDTH)
        for name in ("layer_scale1", "layer_scale2"):
            named[f"{stem}{name}.lambda1"] = np.ones(WIDTH, np.float32)
        for name, shape in _MAPS.items():
            weight, out = f"onnx::MatMul_{block}{name}", f"{stem}{name}.out"
            draw(f"{stem}{name}.bias", shape[1])
            draw(weight, *shape)
            nodes += [
                helper.make_node("MatMul", [f"in_{shape[0]}", weight], [f"{out}.product"]),
                helper.make_node("Add", [f"{stem}{name}.bias", f"{out}.product"], [out]),
            ]
    named["backbone.layernorm.weight"] = np.ones(WIDTH, np.float32)
    draw("backbone.layernorm.bias", WIDTH)
    draw("decoder.final_conv.bias", 1)
    inputs = [
        helper.make_tensor_value_info(f"in_{n}", TensorProto.FLOAT, [1, n])
        for n in (WIDTH, 4 * WIDTH)
    ]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, [1, WIDTH])]
    stored = [numpy_helper.from_array(array, name) for name, array in named.items()]
    return helper.make_model(helper.make_graph(nodes, "tower", inputs, outputs, stored))

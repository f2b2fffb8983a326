"""How nodes of a graph are named after the policy's layers, and read back from a runtime's report.

    vision.blocks.0.attn.q_proj+k_proj+v_proj.b4/MatMul    products of the merged layers' 4-bit rows
    vision.blocks.0.attn.out_proj/Gather                   what puts a layer's rows in order

Runtimes keep a node's name when they fuse it, and add to it: "…/MatMul/MatMulAddFusion". A layer's
name holds no slash. Standard library only: robots read reports too.
"""

import re
from typing import NamedTuple

# ONNX Runtime also appends to names that are not ours: "node_slice_5/GatherSliceToSplitFusion".
_NAMED = re.compile(r"(?P<layer>[^/\s]+?)(?:\.b(?P<bits>\d+))?/(?P<op>(?!\w*Fusion\b)[A-Za-z]\w*)")
# The constants that `qvla_export` makes of a layer, and torch's own.
_CONSTANT = re.compile(
    r"(?:module\.)?(?P<layer>.+?)(?:\.b(?P<bits>\d+))?"
    r"\.(?:codes|halves|scales|multipliers|columns|order|members|channels|fill|pads|pad_axis|zero|weight|bias|"
    r"folded_bias|input_scale|input_zero|hidden|\d+\.pieces)(?:\..*)?"
)


class LayerNode(NamedTuple):
    """The layer a node computes for."""

    layer: str
    # Width of the rows it multiplies; None where it serves all, or the layer is not quantized.
    bits: int | None
    op_type: str


def node_name(layer: str, bits: int | None, op_type: str) -> str:
    """Return the name of a layer's node."""
    return f"{layer}{'' if bits is None else f'.b{bits}'}/{op_type}"


def parse_node_name(name: str) -> LayerNode | None:
    """Return the layer of a named node; None where the name says none."""
    found = _NAMED.match(name)
    if found is None:
        return None
    bits = found["bits"]
    return LayerNode(found["layer"], None if bits is None else int(bits), found["op"])


def parse_constant_name(name: str) -> tuple[str, int | None] | None:
    """Return layer and width of a graph's constant; None where it belongs to no layer."""
    found = _CONSTANT.fullmatch(name)
    if found is None:
        return None
    bits = found["bits"]
    return found["layer"], None if bits is None else int(bits)

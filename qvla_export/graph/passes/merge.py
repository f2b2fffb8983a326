"""Pass: layers that share an input become one layer, so that it costs one MatMul per width.

q, k and v of an attention block, gate and up of a gated MLP. A Split gives each its outputs back.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvla_export.graph.float_graph import LAYER_KEY, layer_nodes
from qvla_export.graph.passes.weights import matrix, side_by_side
from qvla_export.quantizer.packed_storage import one_width_apart
from qvla_export.shared.target import Container

# Metadata of a merged layer: channels of its members, as "64,64,64".
MEMBERS_KEY = "qvla.members"

Widths = Mapping[str, NDArray[np.int8]]


def merge_parallel(
    model: ir.Model, widths: Widths, containers: Mapping[int, Container]
) -> tuple[ir.Model, dict[str, NDArray[np.int8]]]:
    """Return a copy of a float graph with planned MatMuls of one input merged, and its widths.

    A merged layer is named after its members ("attention.q_proj+k_proj+v_proj"); its channels are
    theirs, side by side in graph order.

    Args:
        model: from `export_float`, maybe after other passes; left as it is.
        widths: layer name -> int8 [channels] of the planned layers.
        containers: of the target; on ONNX Runtime, layers of one width stay apart.
    """
    model = model.clone()
    groups: dict[ir.Value, list[str]] = {}
    for name, node in layer_nodes(model).items():
        if name in widths and node.op_type == "MatMul" and node.inputs[0] is not None:
            groups.setdefault(node.inputs[0], []).append(name)
    merged = dict(widths)
    for members in groups.values():
        if len(members) > 1 and not one_width_apart([widths[n] for n in members], containers):
            joined = _merge(model, members)
            merged[joined] = np.concatenate([merged.pop(name) for name in members])
    return model, merged


def members_of(name: str) -> list[str]:
    """Return the layers that a layer was merged from, in the order of its channels."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{member}" if parent else member for member in last.split("+")]


def _merge(model: ir.Model, members: Sequence[str]) -> str:
    """Replace the members' nodes by one MatMul and a Split; return its name."""
    found = layer_nodes(model)
    nodes = [found[name] for name in members]
    weights = [matrix(node) for node in nodes]
    channels = [int(weight.shape.numpy()[1]) for weight in weights]
    parent = members[0].rpartition(".")[0]
    name = ".".join([parent, "+".join(m.removeprefix(f"{parent}.") for m in members)])
    tape = ir.tape.Tape()
    weight = side_by_side(weights, f"{name}.weight")
    sizes = ir.Tensor(np.array(channels, np.int64), name=f"{name}.sizes")
    inputs = nodes[0].inputs[0]
    product = tape.op(
        "MatMul",
        [inputs, tape.initializer(weight)],
        metadata_props={LAYER_KEY: name, MEMBERS_KEY: ",".join(map(str, channels))},
    )
    outputs = tape.op_multi_out(
        "Split", [product, tape.initializer(sizes)], {"axis": -1}, num_outputs=len(nodes)
    )
    for value in tape.initializers:
        model.graph.register_initializer(value)
    old = [node.outputs[0] for node in nodes]
    for new, replaced in zip(outputs, old, strict=True):
        new.name, new.type, new.shape = replaced.name, replaced.type, replaced.shape
        replaced.name = f"{replaced.name}.unmerged"
    # All members only need the shared input, so the first one's place suits the merged node.
    ir.convenience.replace_nodes_and_values(
        model.graph, nodes[0], nodes, list(tape.nodes), old, list(outputs)
    )
    return name

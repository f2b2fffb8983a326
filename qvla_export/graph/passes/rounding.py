"""Pass: planned layers get the weights of a plan's rounding, still as floats.

Later passes reorder and merge them as any weights; at their scales they become the same codes.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvla_export.graph.float_graph import ExportError, layer_nodes
from qvla_export.graph.lazy_tensors import mapped
from qvla_export.graph.passes.merge import members_of
from qvla_export.graph.passes.weights import register
from qvla_export.quantizer.packed_storage import stored_inputs
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.scale_search import Steps

LayerSteps = dict[str, Steps]


def round_weights(model: ir.Model, plan: BitPlan) -> ir.Model:
    """Return a copy of a float graph with the weights that engines compute with.

    Args:
        model: from `export_float`; left as it is.
        plan: with a rounding of all its layers.

    Raises:
        ExportError: a planned layer is not in the graph.
    """
    assert plan.rounding is not None
    model = model.clone()
    nodes = layer_nodes(model)
    for name, rounded in plan.rounding.layers.items():
        if name not in nodes:
            raise ExportError(f"the plan names layer {name!r}, which the graph does not have")
        order = plan.stored_order(name)
        rows = partial(rounded.rows, plan.widths[name], plan.quantizer, order)
        _replace_weight(model.graph, nodes[name], f"{name}.rounded", rows)
    return model


def stored_steps(plan: BitPlan) -> LayerSteps:
    """Return the scales and zero points of every layer's channels as a coupled graph stores them.

    Returns:
        Layer name -> of [stored channels, groups]; ones and zeros for units that fill up.
    """
    assert plan.rounding is not None
    found = {name: layer.steps for name, layer in plan.rounding.layers.items()}
    for consumer, coupling in plan.couplings.items():
        order = coupling.order
        units = stored_inputs(len(order), plan.widths[consumer], plan.containers)
        for name in coupling.producers:
            found[name] = found[name].of(order).padded_to(units)
    return found


def merged_steps(steps: LayerSteps, names: Mapping[str, object]) -> LayerSteps:
    """Return the steps of layers after those of one input were merged, by the merged names."""
    return {
        name: Steps.concatenate([steps[member] for member in members_of(name)]) for name in names
    }


def _replace_weight(
    graph: ir.Graph, node: ir.Node, name: str, rows: Callable[[], NDArray[np.float32]]
) -> None:
    """Give a layer other rows [channels, inputs], which are computed when they are needed."""
    old = node.inputs[1]
    assert old is not None and old.shape is not None
    shape = old.shape.numpy()
    transposed = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 0
    )

    def weight() -> NDArray[np.float32]:
        return rows().T if transposed else rows().reshape(shape)

    constant = mapped([], weight, ir.DataType.FLOAT, shape, name)
    node.replace_input_with(1, register(graph, constant))

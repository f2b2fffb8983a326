"""What a plan made of a policy's graph: operators and multiplications."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qvla_export.graph.buckets_to_onnx import ORDER_SUFFIX
from qvla_export.quantizer.packed_storage import stored_columns, stored_layers
from qvla_export.quantizer.plan import BitPlan


@dataclass(frozen=True)
class GraphFigures:
    """Figures of a bundle's graph; the manifest holds them as "graph" of the plan.

    The bytes by width are the manifest's "weight_bytes".
    """

    # Operators that run at inference: none of what is computed from constants alone.
    nodes: int
    matmuls: int
    # Gathers that restore the order of a planned layer's channels.
    order_gathers: int
    # Those of them behind an MLP's producers, whose order its consumer takes: 0.
    mlp_gathers: int
    # Multiplications of the planned layers per token, and how many fewer the graph does: pruned
    # channels and inputs whose hidden unit is constant, less the zeros that fill up groups and
    # columns. Below 0 where those are more.
    multiplications: int
    multiplications_removed: int


def measure_graph(model: ir.Model, plan: BitPlan | None) -> GraphFigures:
    """Count a bucketed graph's operators, and its plan's multiplications.

    Args:
        model: as it is shipped.
        plan: what it was made with, of its own layers; None where none is planned.
    """
    constant: set[ir.Value] = set(model.graph.initializers.values())
    running = []
    for node in model.graph:
        # What runtimes do once at load, or, with a DequantizeLinear, in the product.
        if any(node.inputs) and all(v is None or v in constant for v in node.inputs):
            constant.update(node.outputs)
        else:
            running.append(node)
    operators = [node.op_type for node in running]
    orders = [
        node
        for node in running
        if node.op_type == "Gather"
        and str(node.inputs[1] and node.inputs[1].name).endswith(ORDER_SUFFIX)
    ]
    every = 0
    if plan is not None:
        every = sum(len(w) * plan.weights_per_channel[name] for name, w in plan.widths.items())
    return GraphFigures(
        nodes=len(running),
        matmuls=operators.count("MatMul"),
        order_gathers=len(orders),
        mlp_gathers=0 if plan is None else _of_producers(orders, plan),
        multiplications=every,
        multiplications_removed=0 if plan is None else every - _multiplications_left(plan),
    )


def _of_producers(orders: Iterable[ir.Node], plan: BitPlan) -> int:
    producers = {name for coupling in plan.couplings.values() for name in coupling.producers}
    layers = {
        str(node.inputs[1] and node.inputs[1].name).removesuffix(ORDER_SUFFIX) for node in orders
    }
    # A merged layer is named "<parent>.<member>+<member>".
    parts = [(layer.rpartition(".")[0], layer.rpartition(".")[2].split("+")) for layer in layers]
    return sum(any(f"{parent}.{m}" in producers for m in members) for parent, members in parts)


def _multiplications_left(plan: BitPlan) -> int:
    """Sizes of all stored weights: the graph multiplies what fills them up as well."""
    done = 0
    for layer in stored_layers(plan.widths, plan.weights_per_channel, plan.containers):
        for bits in np.unique(layer.widths[layer.widths > 0]).tolist():
            container = plan.containers[bits]
            columns = stored_columns(int((layer.widths == bits).sum()), container)
            done += columns * container.stored_inputs(layer.inputs)
    return done

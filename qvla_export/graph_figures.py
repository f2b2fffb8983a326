"""What a plan made of a policy's graph: operators and multiplications."""

from dataclasses import dataclass

import onnx_ir as ir

from qvla_export.buckets_to_onnx import ORDER_SUFFIX
from qvla_export.coupling import find_couplings
from qvla_export.plan import BitPlan


@dataclass(frozen=True)
class GraphFigures:
    """Figures of a bundle's graph; the manifest holds them as "graph" of the plan.

    The bytes by width are the manifest's "weight_bytes".
    """

    # Operators that run at inference; constants' Cast and DequantizeLinear not counted.
    nodes: int
    matmuls: int
    # Gathers that restore the order of a planned layer's channels.
    order_gathers: int
    # Multiplications of the planned layers per token, and what 0 bits took away of them:
    # pruned channels, and inputs whose hidden unit is constant.
    multiplications: int
    multiplications_removed: int


def measure_graph(model: ir.Model, plan: BitPlan | None) -> GraphFigures:
    """Count a bucketed graph's operators, and its plan's multiplications.

    Args:
        model: as it is shipped.
        plan: what it was made with, of its own layers; None where none is planned.
    """
    running = [node for node in model.graph if node.op_type not in ("Cast", "DequantizeLinear")]
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
        multiplications=every,
        multiplications_removed=0 if plan is None else every - _multiplications_left(plan),
    )


def _multiplications_left(plan: BitPlan) -> int:
    inputs = dict(plan.weights_per_channel)
    kept = {name: int((widths > 0).sum()) for name, widths in plan.widths.items()}
    for coupling in find_couplings(plan.widths, plan.weights_per_channel):
        inputs[coupling.consumer] = len(coupling.order)
        for name in coupling.producers:
            kept[name] = int((plan.widths[name][coupling.order] > 0).sum())
    return sum(inputs[name] * kept[name] for name in kept)

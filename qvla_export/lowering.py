"""Float graph + plan -> the graph a target runs: all passes, in order."""

from collections.abc import Iterable

import onnx_ir as ir

from qvla_export.bucketize import bucketize
from qvla_export.buckets_to_onnx import CODES_SUFFIX, HALVES_SUFFIX, SCALES_SUFFIX
from qvla_export.coupling import find_couplings
from qvla_export.float_graph import layer_nodes
from qvla_export.float_storage import STORED_SUFFIX, store_exactly
from qvla_export.passes.couple import couple_mlps
from qvla_export.passes.integer_products import keep_integer_products
from qvla_export.passes.merge import merge_parallel
from qvla_export.passes.quantize_activations import quantize_activations
from qvla_export.plan import BitPlan
from qvla_export.target import Target


def lower(graph: ir.Model, plan: BitPlan | None, target: Target) -> tuple[ir.Model, dict[str, int]]:
    """Return a float graph as it is shipped, and the bytes of its constants by part.

    The parts are "2", "4", "8", "16" and "scales" of planned layers, "float" of layers without a
    plan, and "rest".

    Args:
        graph: from `export_float`; left as it is.
        plan: widths of the channels; None keeps every layer in float.
        target: whose containers and arithmetic the graph gets.
    """
    if plan is not None:
        couplings = find_couplings(plan.widths, plan.weights_per_channel)
        coupled, widths = couple_mlps(graph, plan.widths, couplings)
        if plan.activations is not None:
            coupled = quantize_activations(coupled, plan.activations, target)
        merged, widths = merge_parallel(coupled, widths)
        bucketized = bucketize(merged, widths, plan.quantizer)
        if plan.activations is not None and target.runtime == "ort":
            bucketized = keep_integer_products(bucketized)
        model = store_exactly(bucketized)
        return model, _bucket_bytes(model)
    layer_weights = _layer_weights(graph)
    model = store_exactly(graph)
    return model, _float_bytes(model, layer_weights | {n + STORED_SUFFIX for n in layer_weights})


def _layer_weights(model: ir.Model) -> set[str]:
    values = (node.inputs[1] for node in layer_nodes(model).values())
    return {value.name for value in values if value is not None and value.name is not None}


def _float_bytes(model: ir.Model, layer_weights: set[str]) -> dict[str, int]:
    found = {"float": 0, "rest": 0}
    for name, nbytes in _constant_bytes(model):
        found["float" if name in layer_weights else "rest"] += nbytes
    return found


def _bucket_bytes(model: ir.Model) -> dict[str, int]:
    """Bytes of the constants: "2", "4", "8", "16" of planned layers, "scales", "rest"."""
    found: dict[str, int] = {"16": 0, "8": 0, "4": 0, "2": 0, "scales": 0, "rest": 0}
    for name, nbytes in _constant_bytes(model):
        if name.endswith(SCALES_SUFFIX):
            found["scales"] += nbytes
        elif name.endswith((CODES_SUFFIX, HALVES_SUFFIX)):
            found[name.rsplit(".", 2)[1].removeprefix("b")] += nbytes
        else:
            found["rest"] += nbytes
    return found


def _constant_bytes(model: ir.Model) -> Iterable[tuple[str, int]]:
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value.nbytes

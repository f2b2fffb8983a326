"""Pass: swap each planned layer of a float graph for its buckets of packed weights.

A pruned (0-bit) channel leaves the MatMul; its output is its bias, as in the layer whose row is
zero. Convolutions become unfold + MatMul, see `passes.convolutions`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qvla_export.graph.buckets import BucketedWeight, bucket_weight, expanded_weight
from qvla_export.graph.buckets_to_onnx import BucketEmitter, Store, keep
from qvla_export.graph.expanded_to_onnx import ExpandedEmitter
from qvla_export.graph.float_graph import LAYER_KEY, ExportError, layer_nodes, weight_rows
from qvla_export.graph.passes.convolutions import emit_convolution
from qvla_export.graph.passes.merge import MEMBERS_KEY
from qvla_export.graph.passes.quantize_activations import token_sizes
from qvla_export.quantizer.packed_storage import side_by_side
from qvla_export.quantizer.quantize import QuantizerSpec
from qvla_export.quantizer.scale_search import Steps
from qvla_export.shared.target import Target


def bucketize(
    model: ir.Model,
    widths: Mapping[str, NDArray[np.int8]],
    spec: QuantizerSpec,
    target: Target,
    store: Store = keep,
    steps: Mapping[str, Steps] | None = None,
    rounded_inputs: bool = False,
) -> ir.Model:
    """Return a copy of a float graph with every planned layer in buckets.

    Weights are read one layer at a time. Where the target's compute type is not float32, buckets
    have it already; `to_compute_type` does the rest of the graph.

    Args:
        model: from `export_float`; left as it is.
        widths: layer name -> int8 [channels], each in {0, 2, 4, 8, 16}.
        spec: quantizer of the plan.
        target: whose containers and compute type the buckets get.
        store: gets every packed constant as soon as it is made; may put it on disk.
        steps: layer name -> those its weights were rounded at, of [channels, groups]; None
            chooses them from the weights.
        rounded_inputs: whether the layers read integers; ONNX Runtime on a CPU then gets one
            product of integers a layer, where the codes expand to 8 bits.

    Raises:
        ExportError: a planned layer is not in the graph or has another number of channels.
    """
    model = model.clone()
    nodes = layer_nodes(model)
    if unknown := sorted(set(widths) - set(nodes)):
        raise ExportError(
            f"the plan names layers that the graph does not have: {unknown}; "
            "make the plan from this policy"
        )
    for name, layer_widths in widths.items():
        node = nodes[name]
        rows = weight_rows(node)
        if len(rows) != len(layer_widths):
            raise ExportError(
                f"the plan gives {len(layer_widths)} widths to layer {name}, "
                f"which has {len(rows)} channels; make the plan from this policy"
            )
        weight = bucket_weight(rows, layer_widths, spec, None if steps is None else steps[name])
        weight = expanded_weight(weight, target.containers)
        used = [part.bits for part in weight.weights]
        expands = side_by_side(used, rows.shape[1], target.containers, rounded_inputs)
        emitter = (ExpandedEmitter if expands else BucketEmitter)(target, store)
        _replace(model.graph, node, name, weight, emitter)
    RemoveUnusedNodesPass()(model)
    return model


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    name: str,
    weight: BucketedWeight,
    emitter: BucketEmitter,
) -> None:
    """Put buckets in the place of a layer, and of the Split behind it if it is a merged one."""
    inputs, old_nodes = node.inputs[0], [node]
    assert inputs is not None
    if node.op_type == "Conv":
        outputs = [emit_convolution(emitter, node, name, weight)]
    elif MEMBERS_KEY in node.metadata_props:
        sizes = [int(size) for size in node.metadata_props[MEMBERS_KEY].split(",")]
        ((split, _),) = node.outputs[0].uses()
        old_nodes.append(split)
        outputs = _emitted(emitter, name, inputs, weight, sizes)
    else:
        outputs = _emitted(emitter, name, inputs, weight, [weight.channels])
        # A MatMul's bias is an Add of its own and stays where it is.
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            outputs = [emitter.tape.op("Add", [*outputs, node.inputs[2]])]
    for value in emitter.tape.initializers:
        graph.register_initializer(value)
    for new in emitter.tape.nodes:
        new.metadata_props[LAYER_KEY + ".part"] = name
    old = list(old_nodes[-1].outputs)
    for output, replaced in zip(outputs, old, strict=True):
        output.name, old_name = replaced.name, replaced.name
        replaced.name = f"{old_name}.float"
    ir.convenience.replace_nodes_and_values(
        graph, node, old_nodes[::-1], list(emitter.tape.nodes), old, outputs
    )


def _emitted(
    emitter: BucketEmitter,
    name: str,
    inputs: ir.Value,
    weight: BucketedWeight,
    sizes: Sequence[int],
) -> list[ir.Value]:
    """Record a layer's products, multiplied by what its tokens were divided by."""
    outputs, tokens = emitter.emit(name, inputs, weight, sizes), token_sizes(inputs)
    if tokens is None:
        return outputs
    return [emitter.tape.op("Mul", [output, tokens]) for output in outputs]

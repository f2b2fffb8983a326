"""A policy's float graphs: from pixels, prompt and state to the normalized action, batch size 1.

Every plannable layer's node carries its module name in the metadata property `LAYER_KEY`, so that
later passes find layers by name, whatever the exporter did to initializers. Exported once and
reused for all plans.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript.optimizer import optimize_ir
from torch import nn

from qvla_export.graph.lazy_tensors import mapped
from qvla_export.policies.base import Policy, PolicyPart
from qvla_export.quantizer.quantize import as_rows
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Target

LAYER_KEY = "qvla.layer"
# Metadata of the whole graph: digest of the policy and name of the target it was traced for.
POLICY_KEY, TARGET_KEY = "qvla.policy", "qvla.target"
# The same: names of the policy's weights that it was made of; not in shipped graphs.
WEIGHTS_KEY = "qvla.weights"
# Plain operators (no Attention, RMSNormalization): every runtime parses them, and ONNX Runtime
# runs them as fast as opset 23's or faster.
_EXPORT_OPSET = 21
_PREFIX, _TRANSPOSED = "module.", ".transposed"
_LINEAR_OPS = ("MatMul", "Gemm", "Conv")
_LOGGER = logging.getLogger(__name__)


class ExportError(QvlaError):
    """A policy or plan cannot be turned into a graph."""


def export_float(policy: Policy, target: Target) -> dict[str, ir.Model]:
    """Trace a policy into float32 graphs for a target's operator set, as few as its program needs.

    Bundle's inputs are `pixel_values` float32 [1, 6 * images, S, S], `input_ids` int64 [1, prompt]
    (any length from 2), `state` float32 [1, n] where the policy takes one; its output is `actions`
    float32 [1, horizon, dim], normalized. Layers that cannot reach the action are in no graph.

    Returns:
        Part name -> graph, in order.

    Raises:
        ExportError: a layer of the policy is not in the graphs exactly once.
    """
    layers = policy.layers()
    models = {part.name: export_part(policy, part, layers, target) for part in policy.parts()}
    found = [name for model in models.values() for name in layer_nodes(model)]
    if sorted(found) != sorted(layers):
        odd = sorted(name for name in layers if found.count(name) != 1)
        raise ExportError(f"layers must be in the exported graphs once, these are not: {odd}")
    return models


def export_part(
    policy: Policy,
    part: PolicyPart,
    layers: Mapping[str, nn.Module],
    target: Target,
) -> ir.Model:
    """Trace one part into a float32 graph whose constants are read only when needed.

    Args:
        policy: where the weights are read.
        part: one of its parts.
        layers: its quantizable layers; those of the part are tagged in the graph.
        target: for its operator set.

    Raises:
        ExportError: a layer is applied more than once.
    """
    dynamic = {name: _dimensions(sizes) for name, sizes in part.dynamic.items()}
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            part.module,
            tuple(part.inputs.values()),
            dynamo=True,
            opset_version=_EXPORT_OPSET,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            # One entry for *inputs, the forward's only parameter.
            dynamic_shapes=(tuple(dynamic.get(name, {}) for name in part.inputs),),
            verbose=False,
            # Ours happens below: the exporter's own would read every weight to transpose it.
            optimize=False,
        )
    assert program is not None
    model = program.model
    # Before anything is folded: a slice of a parameter has another name afterwards.
    weights = _bind_weights(model, policy)
    optimize_ir(model, should_fold=lambda node: False if _is_weight_transpose(node) else None)
    _transpose_weights(model)
    RemoveUnusedNodesPass()(model)
    tags = _tagged_layers(model, layers)
    ClearMetadataAndDocStringPass()(model)  # stack traces name the files of the exporting machine
    for name, node in tags.items():
        node.metadata_props[LAYER_KEY] = name
    _fix_signature(model, policy, part)
    # From 21 to 25 the operators used here only gained types and optional inputs.
    model.graph.opset_imports[""] = target.opset
    model.ir_version = target.ir_version
    model.producer_name, model.producer_version = "qvla", None
    model.metadata_props.update({POLICY_KEY: policy.digest, TARGET_KEY: target.name})
    model.metadata_props[WEIGHTS_KEY] = json.dumps(weights)
    _LOGGER.info("float graph %s: %d nodes, %d layers", part.name, len(model.graph), len(tags))
    return model


def layer_nodes(model: ir.Model) -> dict[str, ir.Node]:
    """Return the nodes of plannable layers by module name, in graph order."""
    return {
        node.metadata_props[LAYER_KEY]: node
        for node in model.graph
        if LAYER_KEY in node.metadata_props
    }


def policy_weights(model: ir.Model) -> tuple[str, ...]:
    """Return the names of the policy's parameters and buffers that a float graph was made of."""
    return tuple(json.loads(model.metadata_props[WEIGHTS_KEY]))


def weight_rows(node: ir.Node) -> NDArray[np.float32]:
    """Return the weight of a MatMul, Gemm or Conv node, one row a channel.

    float32 [channels, inputs]

    Raises:
        ExportError: the weight is not constant or its layout is not one that torch exports.
    """
    tensor = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] else None
    if tensor is None:
        raise ExportError(f"{node.op_type} {node.name} has no constant weight")
    weight = tensor.numpy()
    if node.op_type == "MatMul":
        return np.ascontiguousarray(weight.T)
    if node.op_type == "Conv":
        return as_rows(weight)
    plain = node.attributes.get_int("transA", 0) == 0 and all(
        node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta")
    )
    if not plain:
        raise ExportError(f"Gemm {node.name} is not a plain linear layer: {node.attributes}")
    return weight if node.attributes.get_int("transB", 0) else np.ascontiguousarray(weight.T)


def _bind_weights(model: ir.Model, policy: Policy) -> list[str]:
    """Make every parameter a constant that is read from the policy when its numbers are needed.

    Returns their names.
    """
    RemoveUnusedNodesPass()(model)
    bound = []
    for key, value in model.graph.initializers.items():
        name = key.removeprefix(_PREFIX)
        if name == key or value.const_value is None:
            continue

        def read(name: str = name, key: str = key) -> ir.Tensor[Any]:
            return ir.Tensor(np.ascontiguousarray(policy.read_weight(name)), name=key)

        value.const_value = ir.LazyTensor(
            read,
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(value.const_value.shape.numpy()),
            name=key,
            cache=False,
        )
        bound.append(name)
    return bound


def _is_weight_transpose(node: ir.Node) -> bool:
    return (
        node.op_type == "Transpose"
        and node.inputs[0] is not None
        and node.inputs[0].is_initializer()
        and str(node.inputs[0].name).startswith(_PREFIX)
    )


def _transpose_weights(model: ir.Model) -> None:
    """Turn Transpose of a matrix of weights into a transposed constant, still unread."""
    for node in list(model.graph):
        if not _is_weight_transpose(node):
            continue
        weight = node.inputs[0]
        assert weight is not None and weight.const_value is not None
        tensor = weight.const_value
        shape = tensor.shape.numpy()[::-1]
        name = f"{weight.name}{_TRANSPOSED}"
        constant = mapped([tensor], np.transpose, tensor.dtype, shape, name)
        value = ir.Value(
            name=name, const_value=constant, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape)
        )
        model.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)


def _tagged_layers(model: ir.Model, layers: Mapping[str, nn.Module]) -> dict[str, ir.Node]:
    """Return the node of each layer that the graph has, found by the name of its weight."""
    found: dict[str, ir.Node] = {}
    for node in model.graph:
        if node.op_type not in _LINEAR_OPS or node.inputs[1] is None:
            continue
        weight = str(node.inputs[1].name).removesuffix(_TRANSPOSED).removeprefix(_PREFIX)
        name = weight.removesuffix(".weight")
        if name in layers and name in found:
            raise ExportError(f"layer {name} is applied more than once; its plan is ambiguous")
        if name in layers:
            found[name] = node
    return found


def _dimensions(sizes: Mapping[int, str]) -> dict[int, Any]:
    """Sizes that may vary, for the tracer, which takes identifiers only."""
    return {
        axis: torch.export.Dim(name.replace("+", "_plus_"), min=2) for axis, name in sizes.items()
    }


def _fix_signature(model: ir.Model, policy: Policy, part: PolicyPart) -> None:
    """State the sizes that the exporter leaves symbolic, under their own names."""
    spec = policy.processor.spec
    for output in model.graph.outputs:
        output.dtype = output.dtype or ir.DataType.FLOAT
        if output.name == "actions":
            output.shape = ir.Shape((1, spec.horizon, spec.action_dim))
    named = {**part.dynamic, **part.outputs}
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        sizes = named.get(str(value.name), {})
        value.shape = ir.Shape([sizes.get(axis, size) for axis, size in enumerate(value.shape)])


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about itself and not about our graph."""
    registry: Any = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry.level
    registry.setLevel(logging.ERROR)  # "torchvision is not installed", four times
    try:
        with warnings.catch_warnings():
            # torch.export copies its own tree specifications through a deprecated class.
            warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)
            # Axes that have one name are one size; the exporter says so of each but the first.
            warnings.filterwarnings("ignore", r".*shares the same shape constraints", UserWarning)
            yield
    finally:
        registry.setLevel(level)

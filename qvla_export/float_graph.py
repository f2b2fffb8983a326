"""A policy's float graph: from pixels, prompt and state to the normalized action, batch size 1.

Every plannable layer's node carries its module name in the metadata property `LAYER_KEY`, so that
later passes find layers by name, whatever the exporter did to initializers. Exported once and
reused for all plans.
"""

import ast
import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from qvla_export.errors import QvlaError
from qvla_export.policies.base import Policy, PolicyBatch
from qvla_export.quantize import as_rows
from qvla_export.target import Target

LAYER_KEY = "qvla.layer"
# Metadata of the whole graph: digest of the policy and name of the target it was traced for.
POLICY_KEY, TARGET_KEY = "qvla.policy", "qvla.target"
# Plain operators (no Attention, RMSNormalization): every runtime parses them, and ONNX Runtime
# runs them as fast as opset 23's or faster.
_EXPORT_OPSET = 21
_PREFIX = "module."
_SCOPES = "pkg.torch.onnx.name_scopes"
_LINEAR_OPS = ("MatMul", "Gemm", "Conv")
_LOGGER = logging.getLogger(__name__)


class ExportError(QvlaError):
    """A policy or plan cannot be turned into a graph."""


class _ActionGraph(nn.Module):
    """What is traced: named inputs of batch size 1 to the executed normalized action."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.module = policy.module
        self._policy = policy

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, state: Tensor | None = None
    ) -> Tensor:
        """Return normalized actions [1, horizon, dim]."""
        return self._policy.greedy_actions(PolicyBatch(pixel_values, input_ids, None, state))


def export_float(policy: Policy, target: Target) -> ir.Model:
    """Trace a policy into a float32 graph for a target's operator set.

    Inputs `pixel_values` float32 [1, 6 * images, S, S], `input_ids` int64 [1, prompt] (any length
    from 2), `state` float32 [1, n] where the policy takes one; output `actions` float32
    [1, horizon, dim], normalized. Layers that cannot reach the action are not in it.

    Raises:
        ExportError: a layer of the policy is not in the graph exactly once.
    """
    feeds = _example_feeds(policy)
    lengths = {"input_ids": {1: torch.export.Dim("prompt", min=2)}}
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            _ActionGraph(policy).eval(),
            tuple(feeds.values()),
            dynamo=True,
            opset_version=_EXPORT_OPSET,
            input_names=list(feeds),
            output_names=["actions"],
            dynamic_shapes=tuple(lengths.get(name, {}) for name in feeds),
            verbose=False,
        )
    assert program is not None
    model = program.model
    found = _tag_layers(model, policy.layers())
    tags = {node: node.metadata_props[LAYER_KEY] for node in found}
    ClearMetadataAndDocStringPass()(model)  # stack traces name the files of the exporting machine
    for node, name in tags.items():
        node.metadata_props[LAYER_KEY] = name
    _fix_signature(model, policy)
    # From 21 to 25 the operators used here only gained types and optional inputs.
    model.graph.opset_imports[""] = target.opset
    model.ir_version = target.ir_version
    model.producer_name, model.producer_version = "qvla", None
    model.metadata_props.update({POLICY_KEY: policy.digest, TARGET_KEY: target.name})
    return model


def layer_nodes(model: ir.Model) -> dict[str, ir.Node]:
    """Return the nodes of plannable layers by module name, in graph order."""
    return {
        node.metadata_props[LAYER_KEY]: node
        for node in model.graph
        if LAYER_KEY in node.metadata_props
    }


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


def _tag_layers(model: ir.Model, layers: Mapping[str, nn.Module]) -> list[ir.Node]:
    """Write each layer's name on its node; the name comes from the scope, the weight confirms."""
    found: dict[str, ir.Node] = {}
    for node in model.graph:
        name = _scope_of(node)
        if node.op_type not in _LINEAR_OPS or name not in layers:
            continue
        weight = getattr(layers[name], "weight").detach().numpy()  # noqa: B009  # typed as union
        if not np.array_equal(weight_rows(node), as_rows(weight)):
            raise ExportError(f"node {node.name} is in layer {name} but has another weight")
        if name in found:
            raise ExportError(f"layer {name} is applied more than once; its plan is ambiguous")
        node.metadata_props[LAYER_KEY] = name
        found[name] = node
    if missing := sorted(set(layers) - set(found)):
        raise ExportError(f"layers not found in the exported graph: {missing}")
    _LOGGER.info("float graph: %d nodes, %d layers", len(model.graph), len(found))
    return list(found.values())


def _scope_of(node: ir.Node) -> str:
    """Module that made a node: the last but one of its scopes, without the wrapper's prefix."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return str(scopes[-2]).removeprefix(_PREFIX) if len(scopes) > 1 else ""


def _example_feeds(policy: Policy) -> dict[str, Tensor]:
    spec = policy.processor.spec
    side = spec.image.size
    feeds = {
        "pixel_values": torch.zeros(1, 6 * len(spec.cameras), side, side),
        "input_ids": torch.tensor([[spec.bos_token_id] * 5 + [spec.suffix_token_id]]),
    }
    if spec.state_dim:
        feeds["state"] = torch.zeros(1, spec.state_dim)
    return feeds


def _fix_signature(model: ir.Model, policy: Policy) -> None:
    """State the action's shape, which the exporter may leave symbolic."""
    spec = policy.processor.spec
    (actions,) = model.graph.outputs
    actions.shape = ir.Shape((1, spec.horizon, spec.action_dim))
    actions.dtype = ir.DataType.FLOAT


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
            yield
    finally:
        registry.setLevel(level)

"""The noun `PartGraph`: one part's graph, read from its file and walked node by node in torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx.checker import ValidationError
from torch import Tensor

from engines.base import EngineError
from engines.torch.constants import ROUNDED, TILED, ConstantValues, Operation
from engines.torch.onnx_operators import OPERATORS

# Inputs that say shapes, axes and counts, by operator: they stay on the CPU.
_SAYS_SHAPE = {
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "ReduceL2": (1,),
    "ReduceMean": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}


class PartGraph:
    """A part's nodes in order, and its constants; what constants alone decide is computed once."""

    def __init__(self, path: Path, device: torch.device, tiled: bool) -> None:
        """Read a graph, with weights that lie beside it.

        Args:
            path: of the graph.
            device: where it runs.
            tiled: whether products with quantized weights are launches of the kernel.

        Raises:
            EngineError: it is damaged, or holds an operator that our bundles do not.
        """
        try:
            model = onnx.load(path)
        except (DecodeError, OSError, ValidationError, ValueError) as error:
            raise EngineError(f"cannot read graph {path}: {error}") from error
        require_operators(model, path)
        self.outputs = [value.name for value in model.graph.output]
        self.constants = {tensor.name: _tensor(tensor) for tensor in model.graph.initializer}
        self.nodes = [_node(node) for node in model.graph.node]
        self._device = device
        if tiled:
            from engines.torch.rounded_inputs import rounded_inputs
            from engines.torch.tiled_products import tiled_products

            values = ConstantValues(self.constants, self.nodes)
            self.nodes = tiled_products(self.nodes, self.outputs, values, device)
            self.nodes = rounded_inputs(self._needed(), self.outputs, values, device)
        self._fold()
        self._static = self._decided()
        # On the device: constants, and what shapes decide, by the shapes that go in.
        self._constants_moved: dict[str, Tensor] = {}
        self._moved: dict[tuple[Any, ...], dict[str, Tensor]] = {}

    def _fold(self) -> None:
        """Compute what constants alone decide, weights' codes included, and free the rest."""
        left = []
        for node in self._needed():
            if all(name in self.constants for name in node.inputs if name):
                inputs = [self.constants[name] if name else None for name in node.inputs]
                self.constants.update(node.results(inputs))
            else:
                left.append(node)
        used = {name for node in left for name in node.inputs} | set(self.outputs)
        self.nodes = left
        self.constants = {name: self.constants[name] for name in used & set(self.constants)}

    def _needed(self) -> list[Operation]:
        """Return the nodes that the outputs depend on, in order."""
        needed, found = set(self.outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.outputs):
                needed.update(node.inputs)
                found.append(node)
        return found[::-1]

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs; each value is freed after its last use."""
        values: dict[str, Tensor] = {**self.constants, **feeds}
        key = tuple(sorted((name, tuple(value.shape)) for name, value in feeds.items()))
        moved = self._moved.setdefault(key, {})
        uses = Counter(name for node in self.nodes for name in set(node.inputs))
        uses.update(self.outputs)
        for node in self.nodes:
            values.update(self._results(node, self._together(node, values, moved)))
            for name in set(node.inputs):
                uses[name] -= 1
                if not uses[name]:
                    values.pop(name, None)
        return {name: values[name] for name in self.outputs}

    def _together(
        self, node: Operation, values: Mapping[str, Tensor], moved: dict[str, Tensor]
    ) -> list[Tensor | None]:
        """Return a node's inputs, all on the device where one is, but those that say a shape.

        What constants and shapes decide is copied once, so that a captured graph copies nothing.
        """
        found = [values[name] if name else None for name in node.inputs]
        shapes = _SAYS_SHAPE.get(node.operator, ())
        rest = {n: v for n, v in enumerate(found) if v is not None and n not in shapes}
        if self._device.type == "cpu" or all(v.device.type == "cpu" for v in rest.values()):
            return found
        for place, value in rest.items():
            if value.device.type == "cpu":
                name = node.inputs[place]
                held = self._constants_moved if name in self.constants else moved
                if name not in held or name not in self._static:
                    held[name] = value.to(self._device)
                found[place] = held[name]
        return found

    def _results(self, node: Operation, inputs: Sequence[Tensor | None]) -> dict[str, Tensor]:
        if node.operator not in (TILED, ROUNDED):
            return node.results(inputs)
        (rows,) = inputs
        assert rows is not None
        if node.operator == ROUNDED:
            return {node.outputs[0]: node.attributes["rounder"](rows)}
        from engines.torch.tiled_products import run_tiled

        return dict(zip(node.outputs, run_tiled(node.attributes, rows), strict=True))

    def _decided(self) -> frozenset[str]:
        """Return the names of values that constants and shapes decide."""
        names = set(self.constants)
        for node in self.nodes:
            if node.operator == "Shape" or all(name in names for name in node.inputs if name):
                names.update(node.outputs)
        return frozenset(names)


def require_operators(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a graph with an operator that no bundle of ours holds.

    Raises:
        EngineError: naming the operators.
    """
    found = {f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph.node}
    unknown = sorted(found - set(OPERATORS))
    if unknown:
        raise EngineError(
            f"graph {path} has operators {unknown}, which the torch engine does not know; it walks "
            "bundles of qvla only: run it by --runtime ort"
        )


def _node(node: onnx.NodeProto) -> Operation:
    attributes = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        attributes[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return Operation(node.op_type, attributes, tuple(node.input), tuple(node.output))


def _tensor(stored: onnx.TensorProto) -> Tensor:
    """Return a constant; whole numbers of less than a byte in int8 or uint8."""
    array = onnx.numpy_helper.to_array(stored)
    if stored.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    if array.dtype.kind == "V":  # ml_dtypes' narrow integers
        narrow = "u" if "uint" in array.dtype.name else "i"
        array = array.astype(np.uint8 if narrow == "u" else np.int8)
    return torch.from_numpy(np.array(array))

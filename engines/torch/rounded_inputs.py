"""What rounds the rows of launches, and a norm before it, as a launch too: one pass over rows.

Where codes are read by launches of the kernel alone, they are int8 numbers around 0, whatever the
graph's zero point. A norm goes in where its result is read by the rounding alone.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from engines.kernels.rounding_form import MOST_INPUTS
from engines.kernels.row_rounder import Norm, RowRounder
from engines.torch.constants import ROUNDED, TILED, ConstantValues, Operation
from engines.torch.onnx_operators import TYPES


def rounded_inputs(
    nodes: Sequence[Operation],
    outputs: Iterable[str],
    values: ConstantValues,
    device: torch.device,
) -> list[Operation]:
    """Return a graph's nodes with each rounding of a launch's rows as one node.

    Args:
        nodes: after `tiled_products`, those that outputs need, in order.
        outputs: of the graph.
        values: what constants decide.
        device: where it runs.
    """
    graph = _Readers(nodes, outputs, values)
    merged: dict[str, Operation] = {}
    absorbed: set[str] = set()
    for node in nodes:
        inputs = graph.inputs_of_launches(node.outputs[0])
        step = symmetric_step(node, values) if node.operator == "QuantizeLinear" else None
        if step is None or inputs is None or inputs > MOST_INPUTS or values.known(node.inputs[0]):
            continue
        source, norm, within = graph.norm_before(node.inputs[0], inputs)
        rounder = RowRounder(step, inputs, norm, device)
        merged[node.outputs[0]] = Operation(
            ROUNDED, {"rounder": rounder}, (source,), node.outputs[:1]
        )
        absorbed |= within
    return [
        merged.get(node.outputs[0], node) for node in nodes if absorbed.isdisjoint(node.outputs)
    ]


def symmetric_step(node: Operation, values: ConstantValues) -> Tensor | None:
    """Return the step of a QuantizeLinear or DequantizeLinear of one scale, codes around 0.

    None of others. A uint8 code's middle is 128.
    """
    scale, *zero = node.inputs[1:]
    if not values.known(scale) or values.of(scale).numel() != 1:
        return None
    middle = values.of(zero[0]) if zero else torch.zeros(1, dtype=torch.uint8)
    symmetric = {torch.int8: 0, torch.uint8: 128}.get(middle.dtype)
    if middle.numel() != 1 or int(middle.reshape(())) != symmetric:
        return None
    return values.of(scale)


class _Readers:
    """Who makes and who reads the values of a graph."""

    def __init__(
        self, nodes: Sequence[Operation], outputs: Iterable[str], values: ConstantValues
    ) -> None:
        self._values = values
        self._producers = {name: node for node in nodes for name in node.outputs}
        self._uses = Counter(name for node in nodes for name in node.inputs)
        self._uses.update(outputs)
        self._launches: dict[str, list[Operation]] = {}
        for node in nodes:
            if node.operator == TILED:
                self._launches.setdefault(node.inputs[0], []).append(node)

    def inputs_of_launches(self, name: str) -> int | None:
        """Return the inputs of the layers that read a value; None where others read it too."""
        launches = self._launches.get(name, [])
        if not launches or len(launches) != self._uses[name]:
            return None
        return int(launches[0].attributes["layer"].inputs)

    def norm_before(self, name: str, inputs: int) -> tuple[str, Norm | None, set[str]]:
        """Return what a norm reads, the norm, and the values that nothing else reads."""
        node, halves = self._alone(name), False
        within = {name}
        if node is not None and node.operator == "Cast":
            halves = TYPES.get(node.attributes["to"]) == torch.float16
            node = self._alone(node.inputs[0]) if halves else None
            within |= set() if node is None else {node.outputs[0]}
        if node is not None and node.operator == "LayerNormalization":
            known = all(map(self._values.known, node.inputs[1:]))
            if known and node.attributes.get("axis", -1) == -1:
                weights, *biases = map(self._values.of, node.inputs[1:])
                if weights.shape == (inputs,):
                    epsilon = node.attributes.get("epsilon", 1e-5)
                    norm = Norm("layer", weights, next(iter(biases), None), epsilon, halves)
                    return node.inputs[0], norm, within
        found = None if node is None else self._rms(node)
        if found is not None and found[1].shape == (inputs,):
            source, weights, epsilon, more = found
            return source, Norm("rms", weights, None, epsilon, halves), within | more
        return name, None, set()

    def _alone(self, name: str) -> Operation | None:
        """Return what makes a value that is read once."""
        return self._producers.get(name) if self._uses[name] == 1 else None

    def _rms(self, outer: Operation) -> tuple[str, Tensor, float, set[str]] | None:
        """Return source, weights, epsilon and inner values of weights * (x / rms(x))."""
        if outer.operator != "Mul":
            return None
        for weights, normal in (outer.inputs, outer.inputs[::-1]):
            inner = self._alone(normal)
            if self._values.known(weights) and inner is not None and inner.operator == "Mul":
                for source, size in (inner.inputs, inner.inputs[::-1]):
                    found = self._size(size, source)
                    if found is not None:
                        epsilon, within = found
                        return source, self._values.of(weights), epsilon, within | {normal}
        return None

    def _size(self, name: str, source: str) -> tuple[float, set[str]] | None:
        """Return epsilon and inner values of 1 / sqrt(mean(source ** 2) + epsilon)."""
        within = {name}
        for operator in ("Reciprocal", "Sqrt"):
            node = self._alone(name)
            if node is None or node.operator != operator:
                return None
            name = node.inputs[0]
            within.add(name)
        added = self._alone(name)
        if added is None or added.operator != "Add":
            return None
        mean, epsilon = added.inputs if self._values.known(added.inputs[1]) else added.inputs[::-1]
        reduced = self._alone(mean)
        square = None if reduced is None else self._alone(reduced.inputs[0])
        if reduced is None or square is None or square.inputs[0] != source:
            return None
        number = self._number
        is_mean = reduced.operator == "ReduceMean" and number(*reduced.inputs[1:]) == -1
        if not is_mean or square.operator != "Pow" or number(square.inputs[1]) != 2:
            return None
        found = number(epsilon)
        return None if found is None else (found, within | {mean, square.outputs[0]})

    def _number(self, *names: str) -> float | None:
        """Return the one number that a value is; None where it is none or more."""
        if len(names) != 1 or not self._values.known(names[0]):
            return None
        value = self._values.of(names[0])
        return float(value.reshape(())) if value.numel() == 1 else None

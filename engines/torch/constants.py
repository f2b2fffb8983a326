"""The nouns `Operation` and `ConstantValues`: operations, and what constants alone decide."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.torch.onnx_operators import OPERATORS

# Launches of kernels in the place of products (`engines.torch.tiled_products`), and of what rounds
# their rows (`engines.torch.rounded_inputs`).
TILED, ROUNDED = "TiledProduct", "RoundedRows"


@dataclass(frozen=True)
class Operation:
    """One operation."""

    operator: str
    attributes: Mapping[str, Any]
    # Names; empty where one is left out.
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def results(self, inputs: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Return the outputs by name."""
        result = OPERATORS[self.operator](self.attributes, *inputs)
        results = result if isinstance(result, tuple) else (result,)
        return {name: one for name, one in zip(self.outputs, results, strict=False) if name}


class ConstantValues:
    """What a graph's constants decide, computed when it is asked for."""

    def __init__(self, constants: Mapping[str, Tensor], nodes: Sequence[Operation]) -> None:
        """Take a graph's constants and its nodes, in order."""
        self._constants = constants
        self._producers: dict[str, Operation] = {}
        known = set(constants)
        for node in nodes:
            if all(name in known for name in node.inputs if name):
                known.update(node.outputs)
                self._producers |= dict.fromkeys(node.outputs, node)
        self._known = frozenset(known)

    def known(self, name: str) -> bool:
        """Say whether constants alone decide a value."""
        return name in self._known

    def of(self, name: str) -> Tensor:
        """Return a value; nothing of it is kept but the graph's own constants."""
        if name in self._constants:
            return self._constants[name]
        node = self._producers[name]
        return node.results([self.of(i) if i else None for i in node.inputs])[name]

    def shape(self, name: str) -> torch.Size:
        """Return a value's shape."""
        return self.of(name).shape

    def kind(self, name: str) -> torch.dtype:
        """Return a value's type."""
        return self.of(name).dtype

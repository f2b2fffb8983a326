"""Pass: store float32 constants in 16 bits wherever that loses nothing.

Published checkpoints are bfloat16, so their weights fit. A Cast restores float32; runtimes fold it
at load, so neither arithmetic nor speed changes, only the file.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvla_export.graph.buckets_to_onnx import SCALES_SUFFIX
from qvla_export.graph.lazy_tensors import mapped
from qvla_export.graph.passes.weights import FOLDED_SUFFIX

STORED_SUFFIX = ".stored"
_SMALLEST = 64  # values; a Cast node costs more than it saves below this
_NARROW_TYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def store_exactly(model: ir.Model) -> ir.Model:
    """Return a copy of a graph whose float32 constants are float16 or bfloat16 where exact.

    Scales and biases of a plan stay: it says how many bits they have. Constants are read one at a
    time, and again when the graph is saved.
    """
    model = model.clone()
    graph = model.graph
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        assert value.name is not None
        wide = value.dtype == ir.DataType.FLOAT and not value.name.endswith(
            (SCALES_SUFFIX, FOLDED_SUFFIX)
        )
        if not wide or tensor is None or tensor.size < _SMALLEST or value.is_graph_output():
            continue
        narrow = _exact_type(tensor.numpy())
        if narrow is not None:
            _replace_by_cast(graph, value, tensor, narrow)
    return model


def _exact_type(values: NDArray[np.float32]) -> np.dtype[Any] | None:
    """Return a 16-bit type that holds equal values, or None."""
    for dtype in _NARROW_TYPES:
        with np.errstate(over="ignore"):
            narrow = values.astype(dtype)
        if np.array_equal(narrow.astype(np.float32), values):
            return dtype
    return None


def _replace_by_cast(
    graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol, dtype: np.dtype[Any]
) -> None:
    def narrowed(values: NDArray[np.float32]) -> NDArray[Any]:
        return values.astype(dtype)

    tape = ir.tape.Tape()
    stored_type, shape = ir.DataType.from_numpy(dtype), tensor.shape.numpy()
    constant = mapped([tensor], narrowed, stored_type, shape, f"{value.name}{STORED_SUFFIX}")
    stored = tape.initializer(constant)
    restored = tape.op("Cast", [stored], {"to": ir.DataType.FLOAT})
    restored.name, restored.type, restored.shape = value.name, value.type, value.shape
    value.replace_all_uses_with(restored)
    assert value.name is not None
    del graph.initializers[value.name]
    graph.register_initializer(stored)
    graph.insert_before(graph[0], list(tape.nodes))

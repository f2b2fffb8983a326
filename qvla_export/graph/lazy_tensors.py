"""Constants that are read, transposed or converted only when someone needs their numbers.

A 7B policy does not fit into memory as float32: its graph holds recipes, and each pass adds a step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def mapped(
    sources: Sequence[ir.TensorProtocol],
    function: Callable[..., NDArray[Any]],
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str,
) -> ir.LazyTensor:
    """Return a constant that `function` makes of other constants' numbers each time it is read.

    Args:
        sources: read in this order and passed to `function` as numpy arrays.
        function: returns an array of the stated dtype and shape.
        dtype, shape: of the result.
        name: of the result.
    """

    def evaluate() -> ir.Tensor[Any]:
        values = function(*(source.numpy() for source in sources))
        # A contiguous copy of a scalar would have one dimension.
        return ir.Tensor(np.ascontiguousarray(values).reshape(shape), name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)

"""What this machine can do at best: products and reading, for the shares that engines reach."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray

from engines.ort import ort_options
from engines.rounds import Clock, time_in_turn

# The best of torch and ONNX Runtime; a machine's other users only ever add time.
_REPEATS = 5


@dataclass(frozen=True)
class MachinePeaks:
    """The best that was measured with these threads."""

    # 1e9 operations a second, a multiply-add counted as two.
    float32_gflops: float
    int8_gops: float
    # Reading a buffer that no cache holds, 1e9 bytes a second.
    bandwidth_gb_s: float

    def of(self, arithmetic: str) -> float:
        """Return the peak of "float32" or "int8"."""
        return self.int8_gops if arithmetic == "int8" else self.float32_gflops


def measure_peaks(
    threads: int, size: int = 2048, buffer_bytes: int = 1 << 30, clock: Clock = "wall"
) -> MachinePeaks:
    """Measure the peaks.

    Args:
        threads: of one operator.
        size: of the square products.
        buffer_bytes: what is read; much more than the last cache.
        clock: the one that contenders are timed by, or shares of these peaks mean nothing.
    """
    operations = 2 * size**3 / 1e9
    left, right = torch.randn(size, size), torch.randn(size, size)
    floats = _product(size, ir.DataType.FLOAT, threads)
    integers = _product(size, ir.DataType.UINT8, threads)
    buffer = torch.ones(buffer_bytes // 4096, 1024)
    vector = torch.ones(1024)
    products = _fastest_s((lambda: left @ right, floats), clock)
    reading = _fastest_s((buffer.sum, lambda: torch.mv(buffer, vector)), clock)
    return MachinePeaks(
        float32_gflops=operations / products,
        int8_gops=operations / _fastest_s((integers,), clock),
        bandwidth_gb_s=buffer.nbytes / reading / 1e9,
    )


def _product(size: int, kind: ir.DataType, threads: int) -> Callable[[], object]:
    """Return a call of ONNX Runtime's product of constants on the right, float32 or u8 x s8."""
    random = np.random.default_rng(0)
    integer = kind == ir.DataType.UINT8
    weight: NDArray[np.generic] = random.normal(size=(size, size)).astype(np.float32)
    x: NDArray[np.generic] = random.normal(size=(size, size)).astype(np.float32)
    if integer:
        weight = random.integers(-127, 128, (size, size)).astype(np.int8)
        x = random.integers(0, 256, (size, size)).astype(np.uint8)
    tape = ir.tape.Tape()
    shape = ir.Shape((size, size))
    value = ir.Value(name="x", type=ir.TensorType(kind), shape=shape)
    constant = tape.initializer(ir.Tensor(weight, name="w"))
    output = tape.op("MatMulInteger" if integer else "MatMul", [value, constant])
    output.name, output.shape = "y", shape
    output.type = ir.TensorType(ir.DataType.INT32 if integer else ir.DataType.FLOAT)
    graph = ir.Graph(
        [value],
        [output],
        nodes=list(tape.nodes),
        initializers=list(tape.initializers),
        opset_imports={"": 21},
    )
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(
        model, ort_options(0, threads), providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"x": x})


def _fastest_s(ways: Sequence[Callable[[], object]], clock: Clock) -> float:
    """Return the seconds of the fastest call of several ways to do one thing."""
    calls = {str(number): way for number, way in enumerate(ways)}
    samples = time_in_turn(calls, _REPEATS, clock=clock)
    return min(float(own.min()) for own in samples.values()) / 1e3

"""What products of one layer take on this GPU: the kernel beside cuBLAS and torch's int8 and int4.

Only products are timed: rows are rounded beforehand. Weights are random; times do not depend on
them, and each answer is compared with the float32 product of the same numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.base import EngineError
from engines.torch.gpu_clock import gpu_ms

# Channels and inputs of a 7B language model's products; those that share an input are one.
LAYERS_7B: Mapping[str, tuple[int, int]] = {
    "q, k, v": (12288, 4096),
    "o": (4096, 4096),
    "gate, up": (22016, 4096),
    "down": (4096, 11008),
}
ROWS = (1, 16, 300, 600)
# Width -> share of the channels; "mixed" has as many bits as a plan of w3a8 with few wide channels.
MIXES: Mapping[str, Mapping[int, float]] = {
    "8 bits": {8: 1.0},
    "4 bits": {4: 1.0},
    "2 bits": {2: 1.0},
    "mixed 8, 4, 2 bits": {8: 0.1, 4: 0.6, 2: 0.3},
    "mixed, 30 % pruned": {8: 0.05, 4: 0.45, 2: 0.2, 0: 0.3},
}
_GROUP = 128
# torch's reasons list all its backends.
_MOST_REASON = 120
_REPEATS, _WARM_UPS = 20, 3
# torch's int8 product takes more rows than this.
_INT_MM_ROWS = 16

# Rows in halves -> the product, and what it must be; building may refuse with a reason.
Contestant = Callable[[Tensor], tuple[Callable[[], Tensor], Tensor]]


@dataclass(frozen=True)
class ProductTime:
    """One contestant at one layer and number of rows."""

    layer: str
    rows: int
    contestant: str
    # Median milliseconds, and the largest difference from the float32 product as a share of its
    # largest number; None where it does not run here.
    ms: float | None
    difference: float | None
    # Why not.
    reason: str = ""

    def __str__(self) -> str:
        if self.ms is None:
            return f"{self.layer}, {self.rows} rows, {self.contestant}: {self.reason}"
        return (
            f"{self.layer}, {self.rows} rows, {self.contestant}: {self.ms:.3g} ms, "
            f"largest difference {self.difference:.1e}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def product_times(
    device: torch.device,
    layers: Mapping[str, tuple[int, int]] = LAYERS_7B,
    rows: Sequence[int] = ROWS,
) -> Iterator[ProductTime]:
    """Yield every contestant's time at every layer and number of rows.

    Args:
        device: a GPU; a CPU where Triton's interpreter or nothing of the kernel runs, in tests.
        layers: name -> channels and inputs.
        rows: how many.
    """
    for layer, shape in layers.items():
        for name, contestant in contestants(shape, device).items():
            for count in rows:
                values = torch.randn(count, shape[1], device=device).half()
                yield _timed(layer, name, contestant, values)


def contestants(shape: tuple[int, int], device: torch.device) -> dict[str, Contestant]:
    """Return who multiplies with a layer of a shape, by name."""
    weights = torch.randn(shape, device=device).mul_(0.02).half()
    found: dict[str, Contestant] = {
        "float16, cuBLAS": lambda rows: _float16(weights, rows),
        "int8, torch": lambda rows: _torch_int8(weights, rows),
        "int4, torchao's product": lambda rows: _torch_int4(weights, rows),
    }
    for name, mix in MIXES.items():
        for kind, integers in (("8-bit", True), ("16-bit", False)):
            found[f"kernel, {name}, {kind} rows"] = _kernel(shape, mix, integers, device)
    return found


def _timed(layer: str, name: str, contestant: Contestant, rows: Tensor) -> ProductTime:
    try:
        product, expected = contestant(rows)
        for _ in range(_WARM_UPS):
            answer = product()
        ms = median(_ms(product, rows.device) for _ in range(_REPEATS))
    except (EngineError, ImportError, RuntimeError) as error:
        # The kernel's, no Triton, and what torch says of an operator or driver that is not there.
        reason = (str(error) or type(error).__name__).splitlines()[0][:_MOST_REASON]
        return ProductTime(layer, len(rows), name, None, None, reason)
    off = (answer.float() - expected).abs().max() / expected.abs().max()
    return ProductTime(layer, len(rows), name, ms, float(off))


def _ms(product: Callable[[], Tensor], device: torch.device) -> float:
    """Return one product's milliseconds by the GPU's events; 0 on a CPU, which is not measured."""
    if device.type != "cuda":
        product()
        return 0.0
    return gpu_ms(product)


def _rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes of one step, and the step [1]."""
    step = values.float().abs().max().reshape(1) / 127
    return (values.float() / step).round().to(torch.int8), step


def _float16(weights: Tensor, rows: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    """Multiply halves as cuBLAS does."""
    return (lambda: rows @ weights.T), rows.float() @ weights.float().T


def _torch_int8(weights: Tensor, rows: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    """Multiply by `torch._int_mm`, rows filled up to what it takes."""
    codes, step = _rounded(rows)
    columns, scale = _rounded(weights)
    missing = max(0, _INT_MM_ROWS + 1 - len(rows))
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -(-missing // 8) * 8))
    expected = codes.float() @ columns.float().T * (step * scale)

    def product() -> Tensor:
        return (torch._int_mm(filled, columns.T)[: len(rows)] * (step * scale)).half()

    return product, expected


def _torch_int4(weights: Tensor, rows: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    """Multiply by `_weight_int4pack_mm`, which torchao's 4-bit weights run in, in bfloat16."""
    channels, inputs = weights.shape
    grouped = weights.float().reshape(channels, -1, _GROUP)
    scale = grouped.abs().amax(2, keepdim=True) / 7
    codes = (grouped / scale).round().clamp(-8, 7)
    expected = rows.bfloat16().float() @ (codes * scale).reshape(channels, inputs).T
    unsigned = (codes + 8).to(torch.int32).reshape(channels, inputs)
    packed = unsigned[:, ::2] << 4 | unsigned[:, 1::2]
    stored = torch.ops.aten._convert_weight_to_int4pack(packed.to(torch.uint8), 8)
    steps = torch.stack([scale.squeeze(2).T, torch.zeros_like(scale.squeeze(2).T)], dim=2)
    values = rows.bfloat16()
    args = (values, stored, _GROUP, steps.contiguous().bfloat16())
    return lambda: torch.ops.aten._weight_int4pack_mm(*args), expected


def _kernel(
    shape: tuple[int, int], mix: Mapping[int, float], integers: bool, device: torch.device
) -> Contestant:
    """Return the kernel's product with a layer of some widths."""
    held: list[Any] = []

    def contestant(rows: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
        from engines.kernels.tiled_layer import TiledLayer

        if not held:  # once for all numbers of rows
            layout, matrix = _layer(shape, mix)
            held.extend((TiledLayer(layout, device), torch.from_numpy(matrix).to(device)))
        layer, matrix = held
        if not integers:
            return (lambda: layer(rows)), rows.float() @ matrix.T
        codes, step = _rounded(rows)
        return (lambda: layer(codes, step)), codes.float() @ matrix.T * step

    return contestant


def _layer(shape: tuple[int, int], mix: Mapping[int, float]) -> tuple[Any, np.ndarray]:
    """Return tiles of random codes, and the float32 weights that they are."""
    from engines.kernels.tile_layout import WidthCodes, lay_out

    channels, inputs = shape
    generator = np.random.default_rng(0)
    stops = np.rint(np.cumsum([0, *mix.values()]) * channels).astype(int)
    order, widths = generator.permutation(channels), []
    matrix = np.zeros(shape, np.float32)
    for bits, start, stop in zip(mix, stops, stops[1:], strict=False):
        mine = order[start:stop]
        if not bits or not len(mine):
            continue
        low = -(1 << (bits - 1))
        codes = generator.integers(low, -low, (len(mine), inputs)).astype(np.int8)
        scales = np.full(len(mine), 0.02 / 128, np.float32)
        factors = None
        if bits < 8:
            size = (len(mine), -(-inputs // _GROUP))
            factors = generator.integers(1, 128 // -low + 1, size).astype(np.uint8)
        widths.append(WidthCodes(bits, mine, codes, scales, factors))
        spread = 1 if factors is None else np.repeat(factors, _GROUP, axis=1)[:, :inputs]
        matrix[mine] = codes.astype(np.float32) * spread * scales[:, None]
    return lay_out(widths, shape), matrix

"""Drawn products under Triton's interpreter, against whole-number arithmetic; run as a script.

TRITON_INTERPRET is read when Triton is imported, so this is a process of its own. All numbers are
drawn so that sums in float32 are exact: what differs from int64 in one bit is wrong.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engines.kernels.launch_form import ProductForm
from engines.kernels.tile_layout import TileLayout, WidthCodes, lay_out
from engines.kernels.tiled_layer import TiledLayer

CPU = torch.device("cpu")
EDGES = (1, 2, 15, 16, 17, 63, 64, 65)
INPUTS = (1, 31, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 320, 511, 512, 520)
# How numbers are drawn: anything, or what carries furthest.
PATTERNS = ("any", "lowest", "highest", "alternating")


def drawn(
    generator: np.random.Generator, pattern: str, low: int, high: int, shape: tuple[int, ...]
) -> NDArray[np.int64]:
    if pattern == "any":
        return generator.integers(low, high, shape, endpoint=True)
    if pattern == "alternating":
        return np.where(np.indices(shape).sum(axis=0) % 2, low, high)
    return np.full(shape, low if pattern == "lowest" else high)


def group_factors(
    generator: np.random.Generator, kind: str, bits: int, shape: tuple[int, int]
) -> NDArray[np.generic] | None:
    if kind == "none" or bits > 4:
        return None
    if kind == "halves":
        return generator.choice([0.25, 0.5, 1, 2], shape).astype(np.float16)
    largest = 128 >> (bits - 1)
    return generator.choice([1, 2, largest // 2, largest], shape).astype(np.uint8)


def spread(width: WidthCodes, group_size: int) -> NDArray[np.float64]:
    """Return codes times their factors."""
    codes = width.codes.astype(np.float64)
    if width.factors is None:
        return codes
    factors = np.repeat(width.factors.astype(np.float64), group_size, axis=1)
    return codes * factors[:, : codes.shape[1]]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    counts = {bits: draw(st.sampled_from((0, *EDGES))) for bits in (2, 4, 8, 16)}
    integers = draw(st.booleans())
    return {
        "counts": counts,
        "pruned": draw(st.sampled_from((0 if any(counts.values()) else 1, 1, 3, 65))),
        "inputs": draw(st.sampled_from(INPUTS)),
        "rows": draw(st.sampled_from((1, 2, 8, 15, 16, 17, 33))),
        "codes": draw(st.sampled_from(PATTERNS)),
        "values": draw(st.sampled_from(PATTERNS)),
        "factors": draw(st.sampled_from(("none", "whole") + (() if integers else ("halves",)))),
        "group_size": draw(st.sampled_from((64, 128))),
        "integers": integers,
        "half": draw(st.sampled_from((torch.float16, torch.bfloat16))),
        "block_rows": draw(st.sampled_from((16, 32))),
        "parts": draw(st.sampled_from((1, 2, 3, 8))),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def check(case: dict[str, object]) -> None:
    generator = np.random.default_rng(case["seed"])
    inputs, integers, group_size = case["inputs"], case["integers"], case["group_size"]
    channels = sum(case["counts"].values()) + case["pruned"]
    places, taken, widths = generator.permutation(channels), 0, []
    weights = np.zeros((channels, inputs))
    scales = np.zeros(channels, np.float32)
    for bits, count in case["counts"].items():
        if count:
            low, high = (-8, 8) if bits == 16 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
            codes = drawn(generator, case["codes"], low, high, (count, inputs))
            groups = -(-inputs // group_size)
            found = group_factors(generator, case["factors"], bits, (count, groups))
            scale = generator.uniform(1e-4, 2, count).astype(np.float32)
            mine = places[taken : taken + count]
            stored = codes.astype(np.float16 if bits == 16 else np.int8)
            widths.append(WidthCodes(bits, mine, stored, scale, found))
            weights[mine], scales[mine] = spread(widths[-1], group_size), scale
            taken += count
    bias = generator.normal(size=channels).astype(np.float32)
    low, high = (-128, 127) if integers else (-8, 8)
    rows = drawn(generator, case["values"], low, high, (case["rows"], inputs))
    layout = lay_out(held_in(widths, case), (channels, inputs), bias)
    out = product(layout, rows, case)
    scale = scales * np.float32(0.5) if integers else scales
    expected = (rows @ weights.T).astype(np.float32) * scale + bias
    np.testing.assert_array_equal(out, expected)
    if integers:
        expanded = [
            WidthCodes(8, w.channels, spread(w, group_size).astype(np.int8), w.scales)
            if w.bits < 16
            else w
            for w in widths
        ]
        wide = [w for w in expanded if w.bits == 8]
        one = [w for w in expanded if w.bits == 16]
        if wide:
            names = ("channels", "codes", "scales")
            one.append(
                WidthCodes(8, *(np.concatenate([getattr(w, n) for w in wide]) for n in names))
            )
        np.testing.assert_array_equal(
            product(lay_out(one, (channels, inputs), bias), rows, case), out
        )


def held_in(widths: list[WidthCodes], case: dict[str, object]) -> list[WidthCodes]:
    """Return widths whose 16-bit numbers are in the rows' own type."""
    if case["integers"] or case["half"] == torch.float16:
        return widths
    return [w if w.bits < 16 else as_bfloat16(w) for w in widths]


def as_bfloat16(width: WidthCodes) -> WidthCodes:
    halves = torch.from_numpy(width.codes.astype(np.float32)).to(torch.bfloat16)
    codes = halves.view(torch.int16).numpy()
    return WidthCodes(width.bits, width.channels, codes, width.scales)


def product(
    layout: TileLayout, rows: NDArray[np.int64], case: dict[str, object]
) -> NDArray[np.float32]:
    form = ProductForm(
        case["block_rows"],
        case["parts"],
        layout.factor_bytes,
        layout.inputs % 256 == 0,
        case["integers"],
        warps=4,
        stages=2,
    )
    kind = torch.int8 if case["integers"] else case["half"]
    scale = torch.tensor([0.5]) if case["integers"] else None
    values = torch.from_numpy(rows).to(kind)
    return TiledLayer(layout, CPU)(values, scale, torch.float32, form).numpy()


if __name__ == "__main__":
    count, start = int(sys.argv[1]), int(sys.argv[2])
    done = []

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: dict[str, object]) -> None:
        check(case)
        done.append(case)

    run()
    print(f"{len(done)} products equal")

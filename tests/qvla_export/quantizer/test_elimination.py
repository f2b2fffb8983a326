"""The elimination: what one weight after another would give, whatever is rounded together."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engines.targets import CPU
from qvla_export.measurement.torch_arrays import TorchArrays
from qvla_export.quantizer.arrays import NumpyArrays
from qvla_export.quantizer.compensation import round_layer, rounded_alone
from qvla_export.quantizer.elimination import Blocking, Elimination, Levels, eliminate
from qvla_export.quantizer.moments import LayerMoments
from qvla_export.quantizer.quantize import Compensation, QuantizerSpec, compensated_spec
from qvla_export.quantizer.shares import Shares

SMALL = Blocking(8, 3, 2, 6, np.float64)
FULL = compensated_spec(CPU)
POINTED = compensated_spec(CPU.with_zero_points())


def second_moments(size: int, generator: np.random.Generator) -> NDArray[np.float64]:
    tokens = generator.standard_normal((size + 5, size)) @ generator.standard_normal((size, size))
    matrix: NDArray[np.float64] = tokens.T @ tokens / len(tokens) + np.eye(size)
    return matrix


def layer_moments(channels: int, inputs: int, seed: int, blocks: int = 1) -> LayerMoments:
    """Of correlated inputs and channels, the latter in some blocks."""
    generator = np.random.default_rng(seed)
    size = -(-channels // blocks)
    of_channels = np.stack([second_moments(size, generator) for _ in range(blocks)])
    return LayerMoments(
        generator.standard_normal(inputs).astype(np.float32),
        second_moments(inputs, generator)[None].astype(np.float32),
        of_channels.astype(np.float32),
    )


def one_by_one(
    targets: NDArray[np.float64],
    levels: Levels,
    of_inputs: NDArray[np.float64],
    of_channels: NDArray[np.float64],
    block: int,
) -> NDArray[np.float64]:
    """Round a weight, let those behind it in row, column and both answer; then the next.

    Through the factor of the inverse of the Kronecker product of both moments, as in the papers.
    """
    count = targets.shape[1]
    # Channels of a block do not see each other while they are rounded.
    upper = np.linalg.cholesky(np.linalg.inv(of_inputs)).T
    across = np.linalg.cholesky(np.linalg.inv(of_channels)).T
    result, left = np.zeros(targets.shape), targets.copy()
    for start in range(0, count, block):
        own = slice(start, min(start + block, count))
        answered = left[:, own].copy()
        for place in range(len(targets)):
            scale = levels.scales[place, own]
            low, high = (
                bound if isinstance(bound, float) else bound[place, own]
                for bound in (levels.low, levels.high)
            )
            result[place, own] = np.clip(np.rint(answered[place] / scale), low, high)
            error = (answered[place] - result[place, own] * scale) / upper[place, place]
            answered[place:] -= np.outer(upper[place, place:], error)
        missing = left[:, own] - result[:, own] * levels.scales[:, own]
        error = np.linalg.solve(across[own, own].T, missing.T)
        left[:, own.stop :] -= (across[own, own.stop :].T @ error).T
    return result


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 20)),
    block=st.integers(1, 7),
    length=st.integers(1, 9),
    runs=st.integers(1, 6),
    pointed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_waves_round_as_one_weight_after_another(
    shape: tuple[int, int], block: int, length: int, runs: int, pointed: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    of_inputs, of_channels = (second_moments(size, generator) for size in shape)
    targets = generator.standard_normal(shape)
    low, high = (-2.0, 1.0)
    zeros = generator.integers(-2, 2, shape).astype(np.float64)
    bounds = (low - zeros, high - zeros) if pointed else (low, high)
    levels = Levels(np.exp(generator.standard_normal(shape)), *bounds)
    arrays = NumpyArrays()
    factor = arrays.factor(of_inputs)
    np.testing.assert_allclose(factor @ factor.T, of_inputs, rtol=1e-9, atol=1e-9)
    found = eliminate(
        targets,
        levels,
        Shares(factor, arrays),
        arrays.factor(of_channels),
        arrays,
        Blocking(shape[1], block, length, runs * length, np.float64),
    )
    np.testing.assert_array_equal(found, one_by_one(targets, levels, of_inputs, of_channels, block))


def devices() -> list[Any]:
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
    return ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, absent])]


@pytest.mark.parametrize("device", devices())
@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.sampled_from((0, 2, 4, 8, 16)), min_size=1, max_size=40),
    inputs=st.integers(1, 150),
    lost=st.integers(0, 20),
    blocks=st.integers(1, 3),
    compensation=st.sampled_from(("none", "inputs", "inputs and channels")),
    spec=st.sampled_from((FULL, POINTED)),
    blocking=st.sampled_from((None, SMALL)),
    seed=st.integers(0, 99),
)
def test_torch_makes_the_codes_that_numpy_makes(
    device: str,
    widths: list[int],
    inputs: int,
    lost: int,
    blocks: int,
    compensation: Compensation,
    spec: QuantizerSpec,
    blocking: Blocking | None,
    seed: int,
) -> None:
    generator, bits = np.random.default_rng(seed), np.array(widths, np.int8)
    rows = generator.standard_normal((len(bits), inputs)).astype(np.float32)
    moments = layer_moments(len(bits), inputs, seed, min(blocks, len(bits)))
    order = generator.permutation(inputs)[: max(1, inputs - lost)]
    gone = np.flatnonzero(bits == 0)[:3]
    quantizer = replace(spec, compensation=compensation)
    made = [
        round_layer(rows, bits, quantizer, moments, order, gone, Elimination(arrays, blocking))
        for arrays in (NumpyArrays(), TorchArrays(torch.device(device)))
    ]
    for field in ("codes", "halves", "scales", "zero_points"):
        np.testing.assert_array_equal(*(getattr(layer, field) for layer in made))


class NotedArrays(NumpyArrays):
    """numpy's; notes what comes to be rounded, in steps of its scale, and the codes it becomes."""

    def __init__(self) -> None:
        self.notes: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def nearest(self, values: Any, scales: Any, low: Any, high: Any, out: Any) -> None:
        assert values.dtype == scales.dtype == np.float32
        real = values / scales
        super().nearest(values, scales, low, high, out)
        self.notes.append((real, out.copy()))


class LedArrays(TorchArrays):
    """torch's, going on from the noted codes, so that one other code brings no others about."""

    def __init__(self, notes: list[tuple[NDArray[Any], NDArray[Any]]]) -> None:
        super().__init__(torch.device("cpu"))
        self._notes = iter(notes)
        self.compared = self.others = 0
        # Of codes that differ: how far numpy's value was from the middle of two, at most.
        self.farthest_from_tie = 0.0

    def nearest(self, values: Any, scales: Any, low: Any, high: Any, out: Any) -> None:
        assert values.dtype == scales.dtype == torch.float32
        super().nearest(values, scales, low, high, out)
        real, codes = next(self._notes)
        other = out.numpy() != codes
        from_tie = np.abs(real.astype(np.float64) - np.floor(real) - 0.5)[other]
        self.compared += codes.size
        self.others += from_tie.size
        self.farthest_from_tie = max(self.farthest_from_tie, from_tie.max(initial=0.0))
        out.copy_(torch.from_numpy(codes))


@pytest.mark.parametrize(
    ("channels", "inputs", "blocking"),
    [
        (40, 90, replace(SMALL, dtype=np.float32)),
        (300, 200, replace(Elimination().blocking_of(4096), panel=64)),
        # As wide layers are.
        (600, 700, Elimination().blocking_of(600)),
    ],
)
def test_torch_makes_the_codes_that_numpy_makes_in_float32(
    channels: int, inputs: int, blocking: Blocking
) -> None:
    """All but those of values within 1e-4 of the middle between two codes."""
    assert blocking.dtype is np.float32
    generator = np.random.default_rng(channels)
    rows = generator.standard_normal((inputs, channels)).astype(np.float32)
    of_inputs, of_channels = (
        second_moments(size, generator).astype(np.float32) for size in (inputs, channels)
    )
    levels = Levels(np.exp(generator.uniform(-2, 0, rows.shape)).astype(np.float32), -8.0, 7.0)

    def codes_by(arrays: NumpyArrays | TorchArrays) -> NDArray[Any]:
        factors = [arrays.factor(moments.copy()) for moments in (of_inputs, of_channels)]
        shares = Shares(factors[0], arrays)
        targets = arrays.put(rows.copy())
        return arrays.get(eliminate(targets, levels, shares, factors[1], arrays, blocking))

    noted = NotedArrays()
    codes = codes_by(noted)
    led = LedArrays(noted.notes)
    np.testing.assert_array_equal(codes_by(led), codes)
    assert len(np.unique(codes)) == 16
    assert led.compared >= rows.size
    assert led.farthest_from_tie <= 1e-4
    assert led.others <= 1e-3 * rows.size


def test_wide_layers_are_rounded_as_well_in_large_blocks_of_float32() -> None:
    """Scales that are chosen earlier, single precision: hardly more squared error."""
    channels, inputs = 520, 192
    moments = layer_moments(channels, inputs, 1)
    generator, order = np.random.default_rng(2), np.arange(inputs)
    rows = generator.standard_normal((channels, inputs)).astype(np.float32)
    widths = generator.choice([0, 2, 4, 8], channels, p=[0.1, 0.3, 0.5, 0.1]).astype(np.int8)
    found = []
    for how in (Elimination(), Elimination(blocking=Blocking(16, 16, 16, 64, np.float64))):
        made = round_layer(rows, widths, FULL, moments, order, elimination=how)
        errors = made.rows(widths, FULL, order).astype(np.float64) - rows
        weighed = moments.channel_matrix(np.arange(channels)) @ errors
        found.append(float((weighed * (errors @ moments.input_matrix(order))).sum()))
    assert found[0] < 1.03 * found[1]


def test_some_channels_alone_are_rounded_as_among_all() -> None:
    moments = layer_moments(24, 40, 3)
    rows = np.random.default_rng(4).standard_normal((24, 40)).astype(np.float32)
    whole = list(rounded_alone(rows, (2, 4, 8), FULL, moments))
    part = list(rounded_alone(rows[5:11], (2, 4, 8), FULL, moments))
    alone = replace(FULL, compensation="inputs")
    for bits, weights, some in zip((2, 4, 8), whole, part, strict=True):
        np.testing.assert_array_equal(weights[5:11], some)
        widths = np.full(24, bits, np.int8)
        made = round_layer(rows, widths, alone, moments, np.arange(40))
        np.testing.assert_array_equal(weights, made.rows(widths, alone, np.arange(40)))


# Channels, inputs, seed -> the error that the loop over single inputs, before runs of them, left.
ERRORS_BEFORE = {
    (520, 192, 1): 227416000.0,
    (640, 256, 2): 673764000.0,
    (768, 128, 3): 201368000.0,
    (600, 320, 4): 789391000.0,
    (900, 96, 5): 160700000.0,
}


def test_wide_layers_keep_the_error_they_had() -> None:
    """In all no more than a thousandth; codes differ where float32 rounds otherwise."""
    found = []
    for channels, inputs, seed in ERRORS_BEFORE:
        generator = np.random.default_rng(seed)
        of_channels = second_moments(channels, generator)[None].astype(np.float32)
        mean = generator.standard_normal(inputs).astype(np.float32)
        of_inputs = second_moments(inputs, generator)[None].astype(np.float32)
        moments = LayerMoments(mean, of_inputs, of_channels)
        rows = generator.standard_normal((channels, inputs)).astype(np.float32)
        widths = generator.choice([0, 2, 4, 8], channels, p=[0.1, 0.3, 0.5, 0.1]).astype(np.int8)
        order = np.arange(inputs)
        made = round_layer(rows, widths, FULL, moments, order)
        errors = made.rows(widths, FULL, order).astype(np.float64) - rows
        weighed = moments.channel_matrix(np.arange(channels)) @ errors
        found.append(float((weighed * (errors @ moments.input_matrix(order))).sum()))
    before = list(ERRORS_BEFORE.values())
    assert sum(found) < 1.001 * sum(before)
    np.testing.assert_allclose(found, before, rtol=0.02)


@pytest.mark.parametrize("size", [1, 127, 128, 300])
def test_factors_of_float32_are_those_of_float64(size: int) -> None:
    matrix = second_moments(size, np.random.default_rng(size))
    exact = NumpyArrays().factor(matrix.copy())
    np.testing.assert_allclose(exact @ exact.T, matrix, rtol=1e-9, atol=1e-9 * size)
    for arrays in (NumpyArrays(), TorchArrays(torch.device("cpu"))):
        found = arrays.get(arrays.factor(matrix.astype(np.float32)))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.triu(found))
        np.testing.assert_allclose(found, exact, atol=1e-3 * np.abs(exact).max())


def test_what_float32_cannot_factor_float64_does() -> None:
    """Positive by less than float32 tells in sums of a thousand."""
    matrix = np.full((300, 300), 1.0, np.float32)
    matrix.flat[::301] = np.nextafter(np.float32(1), np.float32(2))
    exact = matrix.astype(np.float64)
    for arrays in (NumpyArrays(), TorchArrays(torch.device("cpu"))):
        found = arrays.get(arrays.factor(matrix.copy())).astype(np.float64)
        np.testing.assert_allclose(found @ found.T, exact, atol=1e-5)

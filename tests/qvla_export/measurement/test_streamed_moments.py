"""Moments and compensated sensitivities with the weights on disk: as of the whole, counted."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from places import REFERENCE
from torch import nn

from qvla_export.measurement.layer_groups import LayerNeeds
from qvla_export.measurement.measure_moments import measure_moments
from qvla_export.measurement.moment_bounds import MomentSettings, fitting_block, moment_sums
from qvla_export.measurement.weight_errors import error_needs, weight_errors
from qvla_export.policies.layers import error_rows, layer_shapes, rounding_bytes, traced_layers
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.quantizer.moments import LayerMoments, Moments
from qvla_export.quantizer.quantize import QuantizerSpec, WidthRule
from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]
RULES = {2: WidthRule(64, "mse"), 4: WidthRule(64, "mse"), 8: WidthRule()}
COMPENSATED = QuantizerSpec(RULES, weighted_scales=True, compensation="inputs and channels")
HOW = MomentSettings(batch_size=2)


@pytest.fixture(scope="module")
def stored(tiny_checkpoint: Path) -> OftPolicy:
    return load_oft_policy(tiny_checkpoint, resident=False)


@pytest.fixture(scope="module")
def whole(tiny_policy: OftPolicy, tiny_observations: Make) -> Moments:
    return measure_moments(tiny_policy, tiny_observations(5), "c", HOW)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Rounding of float32 products in another order, against the largest number."""
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)


def assert_same(found: Sensitivities, expected: Sensitivities) -> None:
    assert list(found.values) == list(expected.values)
    for name, values in expected.values.items():
        assert_close(found.values[name], values)


def test_moments_from_disk_are_those_of_the_whole(
    stored: OftPolicy, tiny_observations: Make, whole: Moments, tmp_path: Path
) -> None:
    """Prompts differ in length: what pads them in the whole counts nowhere."""
    found = measure_moments(stored, tiny_observations(5), "c", HOW, tmp_path / "progress")
    assert list(found.layers) == list(whole.layers)
    for name, layer in whole.layers.items():
        for part in ("mean", "inputs", "channels"):
            assert_close(getattr(found.layers[name], part), getattr(layer, part))
    assert_close(np.asarray(found.energies), np.asarray(whole.energies))
    # A file is read layer by layer, and says the same of itself.
    found.save(tmp_path / "moments")
    loaded = Moments.load(tmp_path / "moments")
    assert loaded.digest == found.digest and list(loaded.layers) == list(found.layers)
    name = list(found.layers)[-1]
    np.testing.assert_array_equal(loaded.layers[name].inputs, found.layers[name].inputs)
    assert loaded.has_blocks(4096) and not loaded.has_blocks(32)
    with pytest.raises(KeyError):
        loaded.layers["mean"]


@pytest.mark.parametrize("energies", [(1.0,), (1.0, 2.0, -1.0, 0, 0), (1, 2, 3, 4, np.nan)])
def test_energies_are_one_of_each_observation(whole: Moments, energies: tuple[float, ...]) -> None:
    with pytest.raises(QvlaError, match="moments of 5 observations need as many energies"):
        replace(whole, energies=energies)


def test_blocks_shrink_until_the_sums_fit_and_no_further_than_64(
    stored: OftPolicy, tiny_observations: Make
) -> None:
    observations = tiny_observations(3)

    def sums(block: int) -> int:
        wanted = replace(HOW, largest_block=block)
        found = moment_sums(traced_layers(stored), wanted)
        return sum(array.nbytes for array in found.values())

    assert fitting_block(stored, observations, replace(HOW, max_bytes=100_000_000)) == 4096
    # The widest layer has 588 inputs: blocks of 1024 and more are all the same.
    beside = 3_000_000
    small = fitting_block(stored, observations, replace(HOW, max_bytes=sums(128) + beside))
    assert 64 <= small < 1024
    with pytest.raises(QvlaError, match=r"part \w+ needs .* GB: .*--max-memory-gb"):
        fitting_block(stored, observations, replace(HOW, max_bytes=sums(64)))
    few = replace(HOW, largest_block=64, max_bytes=sums(64) + 3_000_000)
    found = measure_moments(stored, observations, "c", few)
    assert max(layer.inputs.shape[-1] for layer in found.layers.values()) == 64


def test_compensated_sensitivities_from_disk_are_those_of_the_whole(
    stored: OftPolicy, tiny_policy: OftPolicy, tiny_observations: Make, whole: Moments
) -> None:
    moments = replace(whole, samples=2, energies=(1.0, 9.0))
    how = FirstOrder(COMPENSATED, (0, 2), probes=1, batch_size=2, moments=moments)
    observations = tiny_observations(2)
    expected = measure_first_order(tiny_policy, observations, "c", how)
    assert_same(measure_first_order(stored, observations, "c", how), expected)
    # The largest layer by itself would leave no room for weights: it is cut.
    largest = max(needs.nbytes() for needs in _needs(stored, COMPENSATED).values())
    cut = replace(how, max_bytes=largest)
    assert_same(measure_first_order(stored, observations, "c", cut), expected)


def _needs(policy: OftPolicy, quantizer: QuantizerSpec) -> dict[str, LayerNeeds]:
    layers = traced_layers(policy)
    moved = dict.fromkeys(layers, (0, 0))
    return dict(error_needs(quantizer, (0, 2))(layers, moved))


@pytest.mark.parametrize("shape", [(96, 512), (512, 96), (300, 700), (600, 500)])
def test_making_errors_takes_no_more_than_is_counted(shape: tuple[int, int]) -> None:
    """numpy's arrays, which tracemalloc sees; the result is counted by itself."""
    channels, inputs = shape
    layer = nn.Linear(inputs, channels, bias=False).requires_grad_(False)
    assert _peak(lambda: error_rows(layer, 4, QuantizerSpec(RULES))) <= (
        4 * channels * inputs + rounding_bytes(channels, inputs)
    )
    tokens = np.random.default_rng(0).standard_normal((2 * inputs, inputs)).astype(np.float32)
    own = LayerMoments(
        tokens.mean(axis=0),
        (tokens.T @ tokens / len(tokens))[None],
        np.eye(channels, dtype=np.float32)[None],
    )
    moments = Moments({"l": own}, 1, 1, 0, "p", "c")
    needs = error_needs(COMPENSATED, (4,))({"l": layer}, {"l": (0, 0)})["l"]
    counted = needs.nbytes()
    assert _peak(lambda: weight_errors("l", layer, (4,), COMPENSATED, moments)) <= counted


def _peak(make: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        make()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_layer_is_rounded_in_blocks_that_do_not_grow_with_it() -> None:
    assert rounding_bytes(4096, 11008) == rounding_bytes(1024, 11008) < 32 << 20
    layer = nn.Linear(2048, 600, bias=False).requires_grad_(False)
    whole = error_rows(layer, 2, QuantizerSpec(RULES))
    assert _peak(lambda: error_rows(layer, 2, QuantizerSpec(RULES))) < whole.nbytes + (32 << 20)
    part = error_rows(layer, 2, QuantizerSpec(RULES), slice(301, 557))
    np.testing.assert_array_equal(part, whole[301:557])


def test_the_reference_policy_from_disk_gives_the_numbers_of_the_whole() -> None:
    policy, stored = load_oft_policy(REFERENCE), load_oft_policy(REFERENCE, resident=False)
    spec, generator = policy.processor.spec, np.random.default_rng(0)
    observations = [
        Observation(
            {n: generator.integers(0, 256, (96, 96, 3), dtype=np.uint8) for n in spec.cameras},
            instruction,
            generator.uniform(-1, 1, spec.state_dim).astype(np.float32),
        )
        for instruction in ("open the drawer", "put the red cube into the bowl")
    ]
    how = FirstOrder(QuantizerSpec(RULES), probes=1, batch_size=2)
    expected = measure_first_order(policy, observations, "c", how)
    assert_same(measure_first_order(stored, observations, "c", how), expected)
    assert sum(values.shape[1] for values in expected.values.values()) == sum(
        channels for channels, _ in layer_shapes(traced_layers(policy)).values()
    )
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("size", [4, 5, 12])
def test_moments_in_blocks_are_those_of_some_inputs(size: int) -> None:
    """About zero as well: exact within blocks, and no direction is negative."""
    generator = np.random.default_rng(0)
    tokens, worth = generator.standard_normal((40, 12)) + 3, generator.uniform(0, 1, 40) ** 8
    worth /= worth.sum()
    mean = worth @ tokens
    central = (tokens - mean).T @ ((tokens - mean) * worth[:, None])
    blocks = np.zeros((-(-12 // size), size, size), np.float32)
    for number, block in enumerate(blocks):
        inside = slice(number * size, min((number + 1) * size, 12))
        block[: inside.stop - inside.start, : inside.stop - inside.start] = central[inside, inside]
    one = np.zeros((1, 1, 1), np.float32)
    moments = LayerMoments(mean.astype(np.float32), blocks, one)
    order = generator.permutation(12)
    found = moments.input_matrix(order)
    expected = (tokens.T @ (tokens * worth[:, None]))[np.ix_(order, order)]
    same = order[:, None] // size == order // size
    np.testing.assert_allclose(found[same], expected[same], rtol=1e-4)
    assert np.linalg.eigvalsh(found).min() > -1e-4

"""Policies as libraries take them, and what they return as codes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qvla_export.baselines.baseline import BaselineLayer
from qvla_export.baselines.layer_adapter import (
    GroupedLinear,
    blocks_of,
    coded,
    even_batches,
    hand_over,
    module_names,
)
from qvla_export.graph.golden import golden_actions
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]


def actions(policy: OftPolicy, observations: list[Observation]) -> Any:
    return golden_actions(policy, None, observations).full_precision


@pytest.fixture
def handed_policy(tiny_checkpoint: Path) -> OftPolicy:
    """A policy that the test may change."""
    return load_oft_policy(tiny_checkpoint)


@given(
    st.integers(2, 8),
    st.sampled_from([None, 4]),
    st.integers(1, 9),
    st.sampled_from([16, 32]),
    st.integers(0, 2**31),
)
def test_codes_and_scales_are_found_again(
    bits: int, group_size: int | None, inputs: int, scale_bits: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    width = inputs if group_size is None else -(-inputs // group_size) * group_size
    groups = 1 if group_size is None else width // group_size
    codes = random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, width)).astype(np.float32)
    # Libraries may have negative scales.
    scales = (random.uniform(0.01, 2, (3, groups)) * random.choice([-1, 1])).astype(np.float32)
    weights = codes * np.repeat(scales, width // groups, axis=1)
    found = coded(weights, scales, bits, group_size, inputs, scale_bits)
    layer = BaselineLayer(found)
    assert np.array_equal(found.codes, codes[:, :inputs])
    assert np.allclose(layer.weight.dequantize(), weights[:, :inputs], rtol=6e-4)
    assert found.scales.dtype.itemsize * 8 == scale_bits


def test_weights_that_are_no_codes_are_refused() -> None:
    scales = np.ones((1, 1), np.float32)
    for weights in ([0.5, 1.0], [8.0, 1.0], [-9.0, 1.0], [np.nan, 1.0]):
        with pytest.raises(QvlaError, match="not 4-bit codes"):
            coded(np.array([weights], np.float32), scales, 4, None, 2, 16)


@pytest.mark.parametrize("group_size", [1, 7, 64])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 4, stride=4),
        nn.Conv2d(2, 3, (3, 5), stride=(1, 2), padding=1, dilation=(1, 2), bias=False),
        nn.Conv2d(1, 2, 3, padding="valid"),
        nn.Linear(10, 4),
    ],
)
def test_a_handed_layer_maps_as_the_layer_does(layer: Any, group_size: int) -> None:
    torch.manual_seed(0)
    shape = (2, 10) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 12, 16)
    inputs = torch.randn(shape)
    handed = GroupedLinear(layer, group_size)
    assert handed.linear.in_features % group_size == 0
    torch.testing.assert_close(handed(inputs), layer(inputs))


def test_convolutions_that_are_no_linear_map_of_patches_are_refused() -> None:
    for layer in (nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, padding="same")):
        with pytest.raises(QvlaError, match="convolutions of one group"):
            GroupedLinear(layer, 4)


def test_a_policy_that_is_handed_over_acts_as_before(
    handed_policy: OftPolicy, tiny_observations: Make
) -> None:
    observations = tiny_observations(3)
    expected = actions(handed_policy, observations)
    shapes = layer_shapes(handed_policy.layers())
    handed = hand_over(handed_policy, 64)
    assert list(handed) == list(shapes)
    assert all(
        isinstance(layer, nn.Linear) and layer.in_features % 64 == 0 for layer in handed.values()
    )
    places = module_names(handed_policy.module, handed)
    assert all(handed_policy.module.get_submodule(p) is handed[n] for n, p in places.items())
    np.testing.assert_allclose(actions(handed_policy, observations), expected, atol=1e-5)


def test_batches_hold_every_observation_and_no_padding(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    batches = even_batches(tiny_policy, tiny_observations(40))
    assert sum(map(len, batches)) == 40
    assert all(batch.prompt_lengths is None for batch in batches)


def test_blocks_are_numbered_modules_in_order() -> None:
    names = ["a.patch", "a.layer.0.q", "a.layer.0.mlp.1.fc", "a.layer.1.q", "b"]
    assert blocks_of(names) == {
        "a.patch": ["a.patch"],
        "a.layer.0": ["a.layer.0.q"],
        "a.layer.0.mlp.1": ["a.layer.0.mlp.1.fc"],
        "a.layer.1": ["a.layer.1.q"],
        "b": ["b"],
    }

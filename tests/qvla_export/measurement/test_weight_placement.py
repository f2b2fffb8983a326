"""Weights kept as stored, raised unit by unit, and read ahead: CPU doubles of what a GPU does."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qvla_export.measurement import raised_weights, weight_placement
from qvla_export.measurement.backward import ProbedBatch, Probes, probed_pass
from qvla_export.measurement.measure_moments import measure_moments
from qvla_export.measurement.moment_bounds import MomentSettings
from qvla_export.measurement.part_reader import PartReader
from qvla_export.measurement.partial_forward import recorded
from qvla_export.measurement.raised_weights import weights_of_units
from qvla_export.measurement.weight_placement import WeightPlacement
from qvla_export.policies.layers import replaced_weights, traced_layers, weight_rows
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.quantizer.quantize import QuantizerSpec, WidthRule
from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]
CPU = torch.device("cpu")
AS_ON_A_GPU = WeightPlacement(CPU, keeps_stored=True)
SETTINGS = FirstOrder(
    QuantizerSpec({2: WidthRule(64, "mse"), 4: WidthRule(64, "mse"), 8: WidthRule()}),
    probes=2,
    batch_size=2,
)


@pytest.fixture(scope="module")
def stored(tiny_checkpoint: Path) -> OftPolicy:
    return load_oft_policy(tiny_checkpoint, resident=False)


@pytest.fixture(scope="module")
def raised(stored: OftPolicy) -> OftPolicy:
    policy = AS_ON_A_GPU.resident(stored)
    assert isinstance(policy, OftPolicy)
    return policy


def traced_weights(policy: OftPolicy) -> set[str]:
    return {f"{name}.weight" for name in traced_layers(policy)}


def test_which_devices_keep_what_is_stored() -> None:
    assert not WeightPlacement.on(CPU).keeps_stored
    assert WeightPlacement.on(torch.device("cuda:0")).keeps_stored
    assert WeightPlacement.on(torch.device("meta")).keeps_stored


def test_weights_stay_bf16_and_actions_are_those_of_float32(
    raised: OftPolicy, tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    types = {name: tensor.dtype for name, tensor in raised.module.named_parameters()}
    stored = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    # The tiny policy's blocks; the rest is small, and read from outside its modules.
    assert stored == weights_of_units(raised.module) & types.keys()
    assert {name for name in traced_weights(raised) if ".layer" in name} <= stored
    batch = tiny_policy.batch(tiny_observations(3))
    with torch.no_grad():
        found = raised.normalized_actions(batch)
        assert found.dtype == torch.float32
        assert torch.equal(found, tiny_policy.normalized_actions(batch))
    assert {name: tensor.dtype for name, tensor in raised.module.named_parameters()} == types


def test_a_pass_with_a_graph_keeps_no_raised_weight(
    raised: OftPolicy,
    tiny_policy: OftPolicy,
    tiny_observations: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Autograd would keep the float32 of every block until the pass back."""
    kept: set[int] = set()

    def noting(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        def note(tensor: Tensor) -> Any:
            packed = pack(tensor)
            if isinstance(packed, tuple):
                kept.add(packed[0].data_ptr())
            return packed

        return torch.autograd.graph.saved_tensors_hooks(note, unpack)

    monkeypatch.setattr(raised_weights, "saved_tensors_hooks", noting)
    batch = ProbedBatch(tiny_observations(2), Probes(2, 0), 0)
    gradients = []
    for policy in (raised, tiny_policy):
        probed = probed_pass(policy, traced_layers(policy), batch)
        gradients.append([g for number in range(2) for g in probed.gradients(number)])
    decoder = [n for n in traced_layers(raised) if n.startswith("language_model.model.layers")]
    layers = traced_layers(raised)
    assert len(decoder) > 10 and {layers[n].weight.data_ptr() for n in decoder} <= kept
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


def test_units_that_are_run_again_are_raised_again(
    raised: OftPolicy, tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    """Partial passes put stand-ins before the units, and leave these as they found them."""
    found = []
    for policy in (raised, tiny_policy):
        layers = traced_layers(policy)
        name = list(layers)[len(layers) // 2]
        batch = policy.batch(tiny_observations(2))
        rows = torch.from_numpy(weight_rows(layers[name], slice(0, 2)))
        for _ in range(2):
            with torch.no_grad(), recorded(policy, layers, batch) as forward:
                found.append(forward.deviations(name, [0, 1], rows))
    for other in found[1:]:
        assert torch.equal(found[0], other)


def test_weights_are_replaced_in_float32(raised: OftPolicy) -> None:
    layers = traced_layers(raised)
    name, layer = next(iter(layers.items()))
    before = layer.weight
    rows = weight_rows(layer) + np.float32(1e-6)
    with replaced_weights(layers, {name: rows}):
        np.testing.assert_array_equal(weight_rows(layer), rows)
    assert layer.weight is before


def test_a_stream_gives_the_same_numbers(
    stored: OftPolicy,
    tiny_observations: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observations = tiny_observations(2)
    moments = MomentSettings(probes=1, batch_size=2)
    settings = replace(SETTINGS, probes=1)
    expected = measure_first_order(stored, observations, "c", settings)
    means = measure_moments(stored, observations, "c", moments)
    monkeypatch.setattr(
        weight_placement.WeightPlacement, "on", classmethod(lambda cls, device: AS_ON_A_GPU)
    )
    found = measure_first_order(stored, observations, "c", settings)
    for name, values in expected.values.items():
        np.testing.assert_array_equal(found.values[name], values)
    again = measure_moments(stored, observations, "c", moments)
    for name, layer in means.layers.items():
        np.testing.assert_array_equal(again.layers[name].inputs, layer.inputs)
    assert all(tensor.is_meta for tensor in stored.module.state_dict().values())


class TestReadAhead:
    ORDER = (("a", "b"), ("c",), ("d",))

    def test_the_next_part_is_read_while_this_one_is_held(self) -> None:
        read: list[str] = []
        seen = threading.Event()

        def take(name: str) -> Tensor:
            read.append(name)
            if name == "c":
                seen.set()
            return torch.zeros(1)

        with PartReader(take, self.ORDER, [True] * 3) as reader:
            assert list(reader.take()) == ["a", "b"]
            assert seen.wait(20), "the second part was read without being asked for"
            assert "d" not in read, "one part ahead, not two"
            assert list(reader.take()) == ["c"] and list(reader.take()) == ["d"]
        assert read == ["a", "b", "c", "d"]

    def test_a_part_without_room_waits_until_it_is_asked_for(self) -> None:
        read: list[str] = []

        def take(name: str) -> Tensor:
            read.append(name)
            return torch.zeros(1)

        with PartReader(take, self.ORDER, [False] * 3) as reader:
            reader.take()
            reader._pool.submit(int).result()  # whatever was begun would be done by now
            assert read == ["a", "b"]
            reader.take()
            assert read == ["a", "b", "c"]

    def test_what_goes_wrong_is_raised_by_the_part_it_is_of(self) -> None:
        def take(name: str) -> Tensor:
            if name == "c":
                raise OSError("the disk is gone")
            return torch.zeros(1)

        with PartReader(take, self.ORDER, [True] * 3) as reader:
            reader.take()
            with pytest.raises(OSError, match="the disk is gone"):
                reader.take()

    def test_leaving_ends_the_reading(self) -> None:
        begun, go_on = threading.Event(), threading.Event()
        read: list[str] = []

        def take(name: str) -> Tensor:
            read.append(name)
            if name == "c":
                begun.set()
                go_on.wait(20)
            return torch.zeros(1)

        order = (("a",), ("c", "d", "e"))
        with pytest.raises(KeyError), PartReader(take, order, [True] * 2) as reader:
            reader.take()
            begun.wait(20)
            threading.Timer(0.05, go_on.set).start()
            raise KeyError
        assert "e" not in read


def test_parts_are_read_ahead_only_where_they_fit(
    stored: OftPolicy, tiny_observations: Make
) -> None:
    from qvla_export.measurement.stream_limits import StreamLimits, open_stream
    from qvla_export.measurement.weight_errors import error_needs

    layers, observations = traced_layers(stored), tiny_observations(1)
    limits = StreamLimits(1, 1, error_needs(SETTINGS.quantizer, SETTINGS.widths), 0, None)
    free = open_stream(stored, layers, observations, limits, WeightPlacement.on(CPU))
    assert all(free.ahead)
    tight = 1_000_000
    while True:  # the smallest bound that a stream can be opened in leaves no room
        try:
            bounded = replace(limits, max_bytes=tight)
            stream = open_stream(stored, layers, observations, bounded, WeightPlacement.on(CPU))
            break
        except Exception:
            tight += 200_000
    assert not all(stream.ahead)

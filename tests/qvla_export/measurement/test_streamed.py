"""Weights on disk, one stage in memory: the numbers of the whole policy, within the bound."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_policy import TINY_CONFIG, write_tiny_checkpoint

from qvla_export.measurement.backward import Contraction
from qvla_export.measurement.part_needs import part_needs
from qvla_export.measurement.streamed import weights_in_memory
from qvla_export.measurement.weight_errors import error_needs
from qvla_export.measurement.whole_policy import room_beside_whole
from qvla_export.pipeline import resources
from qvla_export.pipeline.moments import moment_demand
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.resources import Demand, Resources, open_within
from qvla_export.policies.layers import traced_layers
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.quantizer.quantize import QuantizerSpec, WidthRule
from qvla_export.sensitivity.estimators.first_order import (
    FirstOrder,
    measure_first_order,
    open_first_order,
)
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]
SETTINGS = FirstOrder(
    QuantizerSpec({2: WidthRule(64, "mse"), 4: WidthRule(64, "mse"), 8: WidthRule()}),
    probes=3,
    batch_size=2,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored(tiny_checkpoint: Path) -> OftPolicy:
    return load_oft_policy(tiny_checkpoint, resident=False)


def assert_same(found: Sensitivities, expected: Sensitivities) -> None:
    """Rounding of float32 products in another order, against each layer's largest value."""
    assert list(found.values) == list(expected.values)
    for name, values in expected.values.items():
        scale = float(values.max())
        np.testing.assert_allclose(found.values[name], values, rtol=1e-4, atol=1e-6 * scale)
    assert (found.standard_error is None) == (expected.standard_error is None)
    if found.standard_error is not None and expected.standard_error is not None:
        np.testing.assert_allclose(
            found.standard_error.layers, expected.standard_error.layers, 1e-4
        )


@pytest.mark.parametrize(
    ("probes", "contraction"), [(3, "full"), (None, "full"), (2, "norms"), (2, "isotropic")]
)
def test_parts_from_disk_give_the_numbers_of_the_whole(
    stored: OftPolicy,
    tiny_policy: OftPolicy,
    tiny_observations: Make,
    probes: int | None,
    contraction: Contraction,
) -> None:
    """Prompts differ in length: the whole pads them, parts run them one by one."""
    settings = replace(SETTINGS, probes=probes, contraction=contraction)
    observations = tiny_observations(5)
    if contraction != "full":  # norms take the padding of a batch for tokens
        observations = [replace(o, instruction="push the button") for o in observations]
    whole = measure_first_order(tiny_policy, observations, "c", settings)
    assert_same(measure_first_order(stored, observations, "c", settings), whole)
    assert all(tensor.is_meta for tensor in stored.module.state_dict().values())


def test_groups_within_a_stage_change_nothing(stored: OftPolicy, tiny_observations: Make) -> None:
    observations = tiny_observations(3)
    whole = measure_first_order(stored, observations, "c", SETTINGS)
    cut = measure_first_order(stored, observations, "c", replace(SETTINGS, max_bytes=3_000_000))
    for name, values in whole.values.items():
        np.testing.assert_array_equal(cut.values[name], values)
    # Layers larger than what is left are cut into pieces, products of which round differently.
    tight = replace(SETTINGS, max_bytes=2_300_000)
    stream, _ = open_first_order(stored, observations, tight, CPU)
    of_groups = [piece for part in stream.groups for group in part for piece in group]
    assert len(of_groups) > len(whole.values)
    assert_same(measure_first_order(stored, observations, "c", tight), whole)
    with pytest.raises(QvlaError, match=r"part \w+ needs .* GB: weights .*raise it"):
        measure_first_order(stored, observations, "c", replace(SETTINGS, max_bytes=1_000_000))


def test_a_streamed_measurement_goes_on_where_it_was_killed_with_another_bound(
    stored: OftPolicy, tiny_observations: Make, tmp_path: Path
) -> None:
    observations, journal = tiny_observations(5), tmp_path / "progress"
    done: list[int] = []

    def stop(units: int, whole: int) -> None:
        done.append(units)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_first_order(stored, observations, "c", SETTINGS, journal, stop)
    other = replace(SETTINGS, max_bytes=3_000_000)
    resumed = measure_first_order(
        stored, observations, "c", other, journal, lambda d, w: stop(9, w)
    )
    assert done == [2, 4, 9], "one of three batches was left"
    whole = measure_first_order(stored, observations, "c", SETTINGS)
    for name, values in whole.values.items():
        np.testing.assert_array_equal(resumed.values[name], values)


def test_every_stage_reads_its_own_weights_and_all_layers_are_in_one(
    stored: OftPolicy, tiny_observations: Make
) -> None:
    layers = traced_layers(stored)
    feeds = stored.processor.feeds(tiny_observations(1)[0])
    needs = part_needs(stored, layers, {n: torch.from_numpy(v) for n, v in feeds.items()})
    assert sorted(name for n in needs for name in n.moved) == sorted(layers)
    for part in needs:
        assert {f"{name}.weight" for name in part.moved} <= set(part.reads)
        assert part.weight_bytes == 4 * sum(stored.read_weight(n).size for n in part.reads)
    decoder = next(n for n in needs if n.part.name == "decoder_01")
    assert all(
        n.startswith(
            (
                "language_model.model.layers.1.",
                "language_model.model.rotary",
                "language_model.model.norm",
            )
        )
        for n in decoder.reads
    )


def test_weights_leave_memory_even_on_an_error(stored: OftPolicy) -> None:
    name = "projector.fc1.weight"
    with (
        pytest.raises(ZeroDivisionError),
        weights_in_memory(stored, {name: torch.from_numpy(stored.read_weight(name))}, CPU),
    ):
        weight = stored.module.get_parameter(name)
        np.testing.assert_array_equal(weight.numpy(), stored.read_weight(name))
        assert not weight.requires_grad
        raise ZeroDivisionError
    assert stored.module.get_parameter(name).is_meta


NEEDS = error_needs(SETTINGS.quantizer, SETTINGS.widths)
DEMAND = Demand(NEEDS, lambda layers: 1000)


def test_what_does_not_fit_as_a_whole_is_streamed(stored: OftPolicy) -> None:
    whole = 4 * sum(tensor.numel() for tensor in stored.module.state_dict().values())
    assert room_beside_whole(stored, 2, NEEDS, 0, whole) is None
    ample = 10 * whole + 10_000_000
    room = room_beside_whole(stored, 2, NEEDS, 0, ample)
    more = room_beside_whole(stored, 4, NEEDS, 0, ample)
    assert room is not None and more is not None and more < room < ample - whole
    assert room_beside_whole(stored, 2, NEEDS, 1000, ample) == room - 1000


def test_a_bound_of_memory_chooses_between_whole_and_streamed(
    stored: OftPolicy, tiny_checkpoint: Path
) -> None:
    whole = open_within(Resources(), PolicySource(str(tiny_checkpoint)), DEMAND)
    assert whole.max_bytes is None and whole.policy.on_disk is None
    ample = Resources(batch_size=2, max_bytes=100_000_000)
    roomy = open_within(ample, PolicySource(str(tiny_checkpoint)), DEMAND)
    assert roomy.policy.on_disk is None
    assert roomy.max_bytes == room_beside_whole(stored, 2, NEEDS, 1000, 100_000_000)
    weights = stored.module.state_dict()
    for name, tensor in roomy.policy.module.state_dict().items():
        assert not tensor.is_meta and tensor.shape == weights[name].shape
    narrow = Resources(batch_size=2, max_bytes=1_700_000)
    streamed = open_within(narrow, PolicySource(str(tiny_checkpoint)), DEMAND)
    assert streamed.policy.on_disk is not None and streamed.max_bytes == 1_700_000
    # What cannot be done stage by stage takes the memory it takes.
    assert open_within(narrow, PolicySource(str(tiny_checkpoint)), None).policy.on_disk is None


def test_what_this_machine_cannot_hold_is_refused_before_it_is_begun(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "available_bytes", lambda: 1_000_000)
    with pytest.raises(QvlaError, match=r"weights take .* GB .*0\.001 GB left.*--max-memory-gb"):
        open_within(Resources(), PolicySource(str(tiny_checkpoint)), moment_demand())


def test_a_policy_with_tokens_is_held_whole(tmp_path: Path) -> None:
    config = replace(TINY_CONFIG, head="tokens")
    checkpoint = write_tiny_checkpoint(tmp_path / "tokens", config=config)
    narrow = Resources(batch_size=2, max_bytes=1_700_000)
    assert open_within(narrow, PolicySource(str(checkpoint)), DEMAND).policy.on_disk is None

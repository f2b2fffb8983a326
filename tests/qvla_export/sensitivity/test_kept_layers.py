"""Layers that no plan quantizes are known in every family, and measured as the others are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from act_cases import act_observations, write_tiny_act
from openvla_cases import openvla_observations, write_tiny_openvla
from pi_cases import pi_observations, write_tiny_pi
from smolvla_cases import smolvla_observations, write_tiny_smolvla
from tiny_policy import TINY_CONFIG, write_tiny_checkpoint
from univla_cases import write_tiny_univla

from engines.targets import CPU
from qvla_export.policies.base import Policy
from qvla_export.policies.families import load_policy
from qvla_export.policies.layers import error_rows, replaced_weights, traced_layers, weight_rows
from qvla_export.quantizer.layer_names import WHY_KEPT, kept_kind_of
from qvla_export.quantizer.quantize import spec_for
from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]


def write_pi05(path: Path) -> Path:
    return write_tiny_pi(path, adaptive=True)


def write_diffusion(path: Path) -> Path:
    config = replace(TINY_CONFIG, head="diffusion", diffusion_train_steps=6, diffusion_steps=3)
    return write_tiny_checkpoint(path, config=config)


def tiny(count: int) -> list[Observation]:
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    return [Observation({"image": picture}, "push the button", np.zeros(4))] * count


_TIME = {"projector", "state projection", "action projection", "last projection", "time MLP"}
_HEAD = {"projector", "state projection", "last projection", "action head"}
FAMILIES = {
    "oft": (write_tiny_checkpoint, tiny, _HEAD),
    "diffusion": (write_diffusion, tiny, _HEAD | {"action projection"}),
    "openvla": (write_tiny_openvla, openvla_observations, {"projector", "output layer"}),
    "univla": (
        write_tiny_univla,
        openvla_observations,
        {"projector", "last projection", "action head"},
    ),
    "pi0": (write_tiny_pi, pi_observations, _TIME),
    "pi05": (write_pi05, pi_observations, _TIME - {"state projection"} | {"adaptive norm"}),
    "smolvla": (write_tiny_smolvla, smolvla_observations, _TIME),
    "act": (
        write_tiny_act,
        act_observations,
        {"projector", "state projection", "last projection"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_carrier_of_failure_is_kept_and_measured(family: str, tmp_path: Path) -> None:
    write, observe, kinds = FAMILIES[family]
    policy = load_policy(write(tmp_path / "checkpoint"))
    kept = policy.kept_layers()
    assert {kept_kind_of(name) for name in kept} == kinds <= set(WHY_KEPT)
    assert not set(kept) & set(traced_layers(policy))
    settings = FirstOrder(spec_for(CPU), (2, 4, 8), of_kept=True)
    seen = observe(2)
    measured = measure_first_order(policy, seen, "set", settings)
    assert set(measured.values) == set(kept)
    for name, values in measured.values.items():
        # A single number is its own scale.
        if measured.weights_per_channel[name] > 1:
            assert values[0].sum() > values[2].sum() > 0, name
    fewest = min(measured.values, key=lambda n: measured.values[n].shape[1])
    exact = _deviation_of(policy, fewest, 8, seen)
    assert measured.at(fewest, 8).sum() == pytest.approx(exact, rel=0.1)


@torch.no_grad()
def _deviation_of(policy: Policy, name: str, bits: int, seen: list[Observation]) -> float:
    """Squared deviation of the action, channel by channel, one quantized at a time."""
    layer = dict(policy.kept_layers())[name]
    errors, total = error_rows(layer, bits, spec_for(CPU)), 0.0
    batches = [policy.batch([observation]) for observation in seen]
    before = [policy.normalized_actions(batch) for batch in batches]
    for channel in range(len(errors)):
        rows = weight_rows(layer)
        rows[channel] += errors[channel]
        with replaced_weights({name: layer}, {name: rows}):
            for batch, expected in zip(batches, before, strict=True):
                moved = policy.normalized_actions(batch) - expected
                total += float(moved.double().square().sum()) / len(seen)
    return total


def test_what_a_name_does_not_say_is_other() -> None:
    assert kept_kind_of("something.else") == "other"

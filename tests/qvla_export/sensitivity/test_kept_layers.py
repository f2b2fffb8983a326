"""Layers that no plan quantizes are known in every family, and measured as the others are."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from family_cases import FAMILY_CASES

from engines.targets import CPU
from qvla_export.policies.base import Policy
from qvla_export.policies.families import load_policy
from qvla_export.policies.layers import error_rows, replaced_weights, traced_layers, weight_rows
from qvla_export.quantizer.layer_names import WHY_KEPT, kept_kind_of
from qvla_export.quantizer.quantize import spec_for
from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order
from qvla_export.shared.observation import Observation

_TIME = {"projector", "state projection", "action projection", "last projection", "time MLP"}
_HEAD = {"projector", "state projection", "last projection", "action head"}
# Of each case -> the kinds of its layers that no plan quantizes.
KINDS: Mapping[str, set[str]] = {
    "oft": _HEAD,
    "diffusion": _HEAD | {"action projection"},
    "openvla": {"projector", "output layer"},
    "univla": {"projector", "last projection", "action head"},
    "pi0": _TIME,
    "pi05": _TIME - {"state projection"} | {"adaptive norm"},
    "smolvla": _TIME,
    "act": {"projector", "state projection", "last projection"},
}


@pytest.mark.parametrize("family", KINDS)
def test_every_carrier_of_failure_is_kept_and_measured(family: str, tmp_path: Path) -> None:
    case = FAMILY_CASES[family]
    policy = load_policy(case.write(tmp_path / "checkpoint"))
    kept = policy.kept_layers()
    assert {kept_kind_of(name) for name in kept} == KINDS[family] <= set(WHY_KEPT)
    assert not set(kept) & set(traced_layers(policy))
    settings = FirstOrder(spec_for(CPU), (2, 4, 8), of_kept=True)
    seen = case.observations(2)
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

"""Which layers reach the action is found once a policy, and says of the layers that are there."""

from typing import Any

import pytest
from torch import nn

from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.policies.prismatic import policy as prismatic


def test_layers_are_traced_once(tiny_policy: OftPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    real = prismatic.reached_layers

    def counted(*arguments: Any) -> Any:
        traced.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(prismatic, "reached_layers", counted)
    vars(tiny_policy).pop("_living", None)
    first, kept = tiny_policy.layers(), tiny_policy.kept_layers()
    assert first and kept and not {*first} & {*kept}
    assert list(tiny_policy.layers()) == list(first)
    assert len(traced) == 1


def test_a_layer_that_took_another_s_place_is_the_policy_s(tiny_policy: OftPolicy) -> None:
    name, layer = next((n, x) for n, x in tiny_policy.layers().items() if isinstance(x, nn.Linear))
    owner = tiny_policy.module.get_submodule(name.rpartition(".")[0])
    other = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    setattr(owner, name.rpartition(".")[2], other)
    try:
        assert tiny_policy.layers()[name] is other
    finally:
        setattr(owner, name.rpartition(".")[2], layer)

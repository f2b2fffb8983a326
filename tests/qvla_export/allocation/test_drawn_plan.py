"""Plans drawn at random: exact shares, hidden units pruned together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.targets import TARGETS
from qvla_export.allocation.random_plan import draw_plan
from qvla_export.shared.errors import QvlaError

SHAPES = {
    "b.self_attn.q_proj": (64, 64),
    "b.mlp.gate_proj": (170, 64),
    "b.mlp.up_proj": (170, 64),
    "b.mlp.down_proj": (64, 170),
}


@given(
    st.tuples(*[st.integers(0, 9)] * 5).filter(any),
    st.sampled_from(sorted(TARGETS)),
    st.integers(0, 3),
)
def test_shares_are_kept_in_every_layer(weights: tuple[int, ...], target: str, seed: int) -> None:
    shares = {b: w / sum(weights) for b, w in zip((0, 2, 4, 8, 16), weights, strict=True)}
    plan = draw_plan(SHAPES, shares, TARGETS[target], "0" * 64, seed)
    for name, (channels, _) in SHAPES.items():
        assert len(plan.widths[name]) == channels
        for bits, share in shares.items():
            assert abs(int((plan.widths[name] == bits).sum()) - share * channels) <= 1
    gate, up = plan.widths["b.mlp.gate_proj"], plan.widths["b.mlp.up_proj"]
    np.testing.assert_array_equal(gate == 0, up == 0)
    again = draw_plan(SHAPES, shares, TARGETS[target], "0" * 64, seed)
    assert again.digest == plan.digest


@pytest.mark.parametrize("shares", [{4: 0.5}, {4: 0.5, 3: 0.5}, {8: 0.7, 4: 0.7}])
def test_shares_that_are_none_are_refused(shares: dict[int, float]) -> None:
    with pytest.raises(QvlaError, match="must sum to 1"):
        draw_plan(SHAPES, shares, TARGETS["cpu"], "0" * 64)

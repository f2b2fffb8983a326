"""What a plan's errors do to the action together, to first order, against the action itself."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_bundles import mixed_plan
from tiny_policy import tiny_observations

from engines.targets import CPU
from qvla_export.measurement.backward import Probes
from qvla_export.measurement.plan_deviation import PlanDeviation, plan_deviation
from qvla_export.pipeline.fake_quantized import judge_plan
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.uniform_plan import uniform_plan

WHOLE = Probes(None, 0)


def test_small_errors_together_are_the_actions(tiny_policy: OftPolicy) -> None:
    seen = tiny_observations(4)
    plan = uniform_plan(layer_shapes(tiny_policy.layers()), 8, CPU, tiny_policy.digest)
    found = plan_deviation(tiny_policy, plan, seen, WHOLE)
    drift = judge_plan(tiny_policy, plan, seen)
    numbers = tiny_policy.infer(seen[0]).actions.size
    assert (found.union() / numbers) ** 0.5 == pytest.approx(drift.rms, rel=0.1)
    assert found.union_over_channels() != pytest.approx(1.0, rel=0.01)


def test_the_error_of_one_channel_is_its_own_part(tiny_policy: OftPolicy) -> None:
    plan = mixed_plan(tiny_policy)
    name = list(plan.widths)[-1]
    alone = {n: np.full_like(w, 16) for n, w in plan.widths.items()}
    alone[name][0] = 2
    found = plan_deviation(tiny_policy, replace(plan, widths=alone), tiny_observations(3), WHOLE)
    assert found.union_over_channels([name]) == pytest.approx(1.0, rel=0.05)


def test_parts_of_opposite_signs_cancel_and_pieces_join() -> None:
    signed = np.array([[[1.0, 2.0]], [[-1.0, -2.0]]], np.float32)
    one = PlanDeviation(("a.b.fc1", "c.d.fc1"), signed, np.array([5.0, 5.0]))
    assert one.union() == 0 and one.union(["a.b.fc1"]) == 5
    assert one.union_over_modules == 0
    other = replace(one, signed=np.abs(signed), channel_sums=np.array([1.0, 1.0]))
    both = PlanDeviation.joined([one, other])
    assert both.union() == pytest.approx((0 + 20) / 2)
    assert both.channel_sums.tolist() == [3.0, 3.0]

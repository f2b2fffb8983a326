"""Ranks of channels and widths by the first steps of episodes."""

import numpy as np
import pytest
from places import ROOT

from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import find_task
from engines.targets import CPU
from qvla_export.pipeline.deployment.short_rollouts import ShortRollouts
from qvla_export.pipeline.policy_source import open_checkpoint
from qvla_export.policies.layers import traced_layers, weight_rows
from qvla_export.quantizer.quantize import spec_for
from qvla_export.sensitivity.estimators.base import ChannelWidth, Question, Work
from qvla_export.shared.errors import QvlaError


def test_fewer_bits_take_the_hand_further_from_its_way() -> None:
    policy = open_checkpoint(ROOT / "checkpoints" / "object-state")
    layers = traced_layers(policy)
    before = {name: weight_rows(layer).copy() for name, layer in layers.items()}
    last = list(layers)[-1]
    with Simulator(find_task("push")) as simulator:
        question = Question(policy, (simulator.reset(0),), "c" * 64, spec_for(CPU))
    estimator, told = ShortRollouts(("push",), episodes=1, looks=2), []
    pairs = [ChannelWidth(last, channel, bits) for channel in (0, 1) for bits in (0, 2, 8)]
    work = Work(on_progress=lambda done, whole: told.append((done, whole)))
    apart = estimator.of_pairs(question, pairs, work).reshape(2, 3)
    assert (apart > 0).all() and (apart[:, 2] < 0.1 * apart[:, :2].min(axis=1)).all()
    assert told == [(number, 6) for number in range(1, 7)]
    assert all(np.array_equal(before[name], weight_rows(layers[name])) for name in layers)
    with pytest.raises(QvlaError, match="make no table"):
        estimator.table(question)

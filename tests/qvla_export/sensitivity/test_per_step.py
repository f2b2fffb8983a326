"""The steps of a flow one by one: what a width does in each, with nothing carried to the next."""

from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import qvla
from pi_cases import SLOTS, pi_observations, write_tiny_pi
from small_datasets import write_small_dataset
from smolvla_cases import smolvla_observations, write_tiny_smolvla

from engines.targets import CPU
from qvla_export.policies.families import load_policy
from qvla_export.policies.flow.policy import FlowPolicy, prefix_inputs
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.quantize import spec_for
from qvla_export.sensitivity.estimators.base import ChannelWidth, Question
from qvla_export.sensitivity.estimators.exact import ExactEstimator
from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import CheckpointError


def flow_policy(path: Path) -> FlowPolicy:
    policy = load_policy(path)
    assert isinstance(policy, FlowPolicy)
    return policy


@torch.no_grad()
def test_steps_add_up_to_the_flow_and_do_not_reach_each_other(tmp_path: Path) -> None:
    policy = flow_policy(write_tiny_smolvla(tmp_path / "c")).step_by_step()
    batch = policy.batch(smolvla_observations(2))
    steps, horizon = policy.module.arch.flow.steps, policy.processor.spec.horizon
    moves = policy.normalized_actions(batch).reshape(2, steps, horizon, -1)
    whole = policy.module(prefix_inputs(batch), batch.noise)[..., : moves.shape[-1]]
    began = batch.noise[..., : moves.shape[-1]]
    torch.testing.assert_close(moves.sum(dim=1), whole - began, rtol=0, atol=1e-5)
    # A change that only the first step would carry on: its bias is seen once in every step alike.
    bias = policy.module.get_submodule("action_out_proj").bias
    bias.add_(1.0)
    moved = policy.normalized_actions(batch).reshape(moves.shape) - moves
    bias.sub_(1.0)
    expected = torch.full_like(moved, policy.module.arch.flow.step)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_a_flow_of_one_step_has_the_same_sensitivities(tmp_path: Path) -> None:
    policy = flow_policy(write_tiny_pi(tmp_path / "c", flow_steps=1))
    settings, seen = FirstOrder(spec_for(CPU), (2, 8), probes=2), pi_observations(2)
    whole = measure_first_order(policy, seen, "set", settings)
    stepped = measure_first_order(policy.step_by_step(), seen, "set", settings)
    for name, values in whole.values.items():
        np.testing.assert_allclose(stepped.values[name], values, rtol=1e-4)


def test_first_order_is_what_exact_measurement_finds(tmp_path: Path) -> None:
    policy = flow_policy(write_tiny_pi(tmp_path / "c", flow_steps=2, horizon=2)).step_by_step()
    seen = pi_observations(1)
    table = measure_first_order(policy, seen, "set", FirstOrder(spec_for(CPU), (8,)))
    names = list(table.values)[:: max(1, len(table.values) // 6)]
    pairs = [ChannelWidth(name, 1, 8) for name in names]
    exact = ExactEstimator().of_pairs(Question(policy, seen, "set", spec_for(CPU), (8,)), pairs)
    estimated = [table.at(pair.layer, 8)[1] for pair in pairs]
    np.testing.assert_allclose(estimated, exact, rtol=0.2)


def test_a_policy_without_a_flow_is_refused(tiny_policy: OftPolicy) -> None:
    with pytest.raises(CheckpointError, match="--per-step"):
        tiny_policy.step_by_step()


def test_the_command_keeps_one_way_apart_from_the_other(tmp_path: Path) -> None:
    checkpoint = write_tiny_pi(tmp_path / "c", state_dim=7, cameras=SLOTS[:1], flow_steps=2)
    demonstrations = write_small_dataset(tmp_path / "demos", [4] * 4, dims=7)
    run, common = tmp_path / "run", ("--policy", checkpoint, "--quantizer", "nearest")
    drawn = qvla(
        *("calibrate", "--run", run, "--dataset", demonstrations, "--count", 2, "--held-out", 1),
        *("--camera", f"{SLOTS[0]}=observation.images.image"),
    )
    assert drawn.code == 0, drawn.err
    found = []
    for more in (("--per-step",), ("--per-step",), ("--kept-layers",)):
        done = qvla("sensitivities", "--run", run, *common, "--probes", 1, *more)
        assert done.code == 0, done.err
        assert ("step by step" in done.out) == ("--per-step" in more)
        assert (run / "kept_layers.safetensors").is_file() == ("--kept-layers" in more)
        found.append(Sensitivities.load(run / "sensitivities.safetensors"))
    assert found[0].digest == found[1].digest != found[2].digest
    assert found[0].settings["per_step"] is True and "per_step" not in found[2].settings

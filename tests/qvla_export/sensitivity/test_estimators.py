"""Estimators behind one interface: the oracle, identities on linear policies, hostile questions."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from linear_policies import QUANTIZER, flat, interrupted_until_done, linear_question

from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.quantize import quantize_channels
from qvla_export.sensitivity.estimators.base import (
    ChannelWidth,
    Question,
    all_pairs,
    remove_progress,
)
from qvla_export.sensitivity.estimators.cumulative import Cumulative
from qvla_export.sensitivity.estimators.exact import ExactEstimator
from qvla_export.sensitivity.estimators.first_order import FirstOrderEstimator
from qvla_export.sensitivity.estimators.hessian import (
    HessianEstimator,
    InputMoment,
    hessian_proxy,
    inverse_factor_diagonal,
)
from qvla_export.sensitivity.estimators.registry import Options, find_estimator
from qvla_export.sensitivity.estimators.two_stage import TwoStage, most_important, scale_corrections
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

NAMES = ("first-order", "norm-product", "isotropic-noise", "hessian", "two-stage", "exact")
Make = Callable[..., list[Observation]]


@pytest.fixture(scope="module")
def linear() -> Question:
    """Twelve observations of four tokens, in episodes of 5, 1 and 6 steps."""
    return linear_question(12, (5, 1, 6))


def every_pair(question: Question) -> list[ChannelWidth]:
    return all_pairs(layer_shapes(question.policy.layers()), question.widths)


@pytest.mark.parametrize("case", ["linear", "linear2d", "conv"])
def test_the_input_hessian_proxy_is_the_official_one(oracles: Path, case: str) -> None:
    golden = np.load(oracles / "quantization" / "hessian_proxy.npz")
    weight = torch.from_numpy(golden[f"{case}_weight"])
    if case == "conv":
        outputs, inputs, side, _ = weight.shape
        layer: torch.nn.Module = torch.nn.Conv2d(inputs, outputs, side, stride=side)
    else:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight
    moment = InputMoment(layer)
    samples = [name for name in golden.files if name.startswith(f"{case}_input_")]
    for number in range(len(samples)):
        moment.add(torch.from_numpy(golden[f"{case}_input_{number}"]))
    np.testing.assert_allclose(moment.matrix, golden[f"{case}_H"], rtol=1e-4, atol=1e-5)
    diagonal = inverse_factor_diagonal(moment.matrix).numpy()
    np.testing.assert_allclose(diagonal, golden[f"{case}_diag_hinv"], rtol=1e-4)
    rows = golden[f"{case}_weight"].reshape(len(weight), -1)
    for bits in (0, 2, 4, 8):
        errors = quantize_channels(rows, bits, QUANTIZER).dequantize() - rows
        found = hessian_proxy(errors, diagonal)
        np.testing.assert_allclose(found, golden[f"{case}_proxy_{bits}"], rtol=1e-3)


def test_the_proxy_of_a_policy_is_that_of_its_layers(linear: Question) -> None:
    table = HessianEstimator().table(linear)
    layer = linear.policy.layers()["second"]
    moment = InputMoment(layer)
    for observation in linear.observations:
        moment.add(linear.policy.module.first(linear.policy.batch([observation]).pixel_values))
    diagonal = inverse_factor_diagonal(moment.matrix).numpy()
    expected = hessian_proxy(-layer.weight.numpy(), diagonal)
    np.testing.assert_allclose(table.at("second", 0), expected, rtol=1e-5)
    # However few matrices fit at once.
    np.testing.assert_array_equal(flat(HessianEstimator(max_bytes=1).table(linear)), flat(table))


def test_first_order_is_exact_on_a_linear_network(linear: Question) -> None:
    exact = flat(ExactEstimator().table(linear))
    whole = flat(FirstOrderEstimator(probes=None).table(linear))
    np.testing.assert_allclose(whole, exact, rtol=1e-4, atol=1e-9)
    assert (exact > 1e-6).mean() > 0.9
    # Summed over tokens, errors cancel: what norms cannot see.
    norms = flat(FirstOrderEstimator("norms", probes=None).table(linear))
    assert (norms >= exact * (1 - 1e-4)).all() and np.median(norms / exact) > 1.5


def test_two_stages_are_exact_where_they_measured_and_scaled_elsewhere(linear: Question) -> None:
    # Isotropic noise: a proxy that is off by far, so that its scale shows.
    proxy = FirstOrderEstimator("isotropic", probes=None)
    estimator = TwoStage(proxy, share=0.5)
    pairs = every_pair(linear)
    first = proxy.of_pairs(linear, pairs)
    exact = ExactEstimator().of_pairs(linear, pairs)
    found = estimator.of_pairs(linear, pairs)
    chosen = most_important(proxy.table(linear), 0.5)
    assert len(chosen) == 4
    again = np.array([(pair.layer, pair.channel) in chosen for pair in pairs])
    assert again.sum() == 16
    np.testing.assert_allclose(found[again], exact[again], rtol=1e-6)
    factors = scale_corrections(
        [p for p, a in zip(pairs, again, strict=True) if a], first[again], exact[again]
    )
    scaled = first * [factors[pair.bits] for pair in pairs]
    np.testing.assert_allclose(found[~again], scaled[~again], rtol=1e-6)
    # Appendix G takes the mean over the four tokens where eq. 6 takes the sum.
    assert all(1 < factor < 16 for factor in factors.values())
    np.testing.assert_allclose(flat(estimator.table(linear)), found, rtol=1e-6)


def test_cumulative_sums_steps_and_averages_episodes(linear: Question) -> None:
    pairs = every_pair(linear)
    found = Cumulative(ExactEstimator()).of_pairs(linear, pairs)
    sums = np.zeros(len(pairs))
    for start, length in ((0, 5), (5, 1), (6, 6)):
        part = linear.observations[start : start + length]
        for observation in part:
            single = replace(linear, observations=[observation], episode_lengths=())
            sums += ExactEstimator().of_pairs(single, pairs)
    np.testing.assert_allclose(found, sums / 3, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["cumulative", "cumulative-first-order"])
def test_cumulative_over_episodes_of_one_step_is_the_step(linear: Question, name: str) -> None:
    question = replace(linear, episode_lengths=(1,) * 12)
    step = {"cumulative": "exact", "cumulative-first-order": "first-order"}[name]
    table = find_estimator(name).table(question)
    expected = find_estimator(step).table(question)
    np.testing.assert_array_equal(flat(table), flat(expected))
    assert table.method == f"cumulative, {expected.method}"
    lengths = replace(linear, episode_lengths=())
    with pytest.raises(QvlaError, match="qvla calibrate --frames-per-episode"):
        find_estimator(name).table(lengths)


@pytest.mark.parametrize("name", ["norm-product", "isotropic-noise"])
def test_padding_of_shorter_instructions_counts_for_nothing(
    tiny_policy: OftPolicy, tiny_observations: Make, name: str
) -> None:
    observations = tiny_observations(3)
    together = Question(tiny_policy, observations, "c", QUANTIZER, (0, 4), batch_size=3)
    alone = [replace(together, observations=[each], batch_size=1) for each in observations]
    whole = find_estimator(name, Options(probes=None))
    expected = sum(flat(whole.table(question)).astype(np.float64) for question in alone) / 3
    np.testing.assert_allclose(flat(whole.table(together)), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_every_estimator_are_those_of_its_table(linear: Question, name: str) -> None:
    estimator = find_estimator(name)
    table = estimator.table(linear)
    assert table.method == estimator.method
    pairs = every_pair(linear)
    found = estimator.of_pairs(linear, pairs)
    np.testing.assert_allclose(found, flat(table), rtol=1e-5)
    with pytest.raises(QvlaError, match="no channel 99 of layer 'first'"):
        estimator.of_pairs(linear, [ChannelWidth("first", 99, 4)])


@pytest.mark.parametrize("name", [*NAMES, "cumulative"])
def test_a_stopped_measurement_goes_on_to_the_same_numbers(
    linear: Question, name: str, tmp_path: Path
) -> None:
    estimator = find_estimator(name, Options(share=0.4, max_bytes=4000))
    whole = estimator.table(linear)
    journal = tmp_path / "progress"
    found, stops = interrupted_until_done(estimator, linear, journal)
    assert stops > 1
    np.testing.assert_allclose(flat(found), flat(whole), rtol=1e-6)
    assert found.settings == whole.settings and found.samples == whole.samples
    remove_progress(journal)
    assert not list(tmp_path.iterdir())

"""Sensitivities: first order against exact, files, agreement."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny_policy import TINY_CONFIG, write_tiny_checkpoint

from qvla_export.allocation.allocate import Budget, allocate_bits
from qvla_export.measurement.double_precision import batch_in_float64, in_float64
from qvla_export.measurement.measure_moments import measure_moments
from qvla_export.measurement.partial_forward import recorded
from qvla_export.measurement.standard_error import StandardError
from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.layers import (
    fake_quantized,
    layer_shapes,
    replaced_weights,
    weight_rows,
)
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.quantizer.quantize import QuantizerSpec, WidthRule, quantize_channels
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.sensitivity import agreement
from qvla_export.sensitivity.agreement import Agreement, compare_with_exact, pairs_in_a_minute
from qvla_export.sensitivity.estimators.base import QUIETLY, ChannelWidth, Question, Work, all_pairs
from qvla_export.sensitivity.estimators.exact import ExactEstimator
from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import ArtifactError, PlanMismatch, QvlaError
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import Container, Target

QUANTIZER = QuantizerSpec({2: WidthRule(64, "mse"), 4: WidthRule(64, "mse"), 8: WidthRule()})
SETTINGS = FirstOrder(QUANTIZER, batch_size=2)
TARGET = Target(
    "test",
    "ort",
    ">=1",
    25,
    13,
    {b: Container(b, None, 32 if b < 16 else 0) for b in (2, 4, 8, 16)},
)
Make = Callable[..., list[Observation]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads than one only wait for each other on networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def first_order(tiny_policy: OftPolicy, tiny_observations: Make) -> Sensitivities:
    return measure_first_order(tiny_policy, tiny_observations(5), "calibration", SETTINGS)


def sampled(policy: OftPolicy, count: int, widths: tuple[int, ...]) -> list[ChannelWidth]:
    pairs = all_pairs(layer_shapes(policy.layers()), widths)
    chosen = np.random.default_rng(0).choice(len(pairs), count, replace=False)
    return [pairs[i] for i in chosen]


def exact_of(
    policy: OftPolicy,
    observations: list[Observation],
    pairs: list[ChannelWidth],
    work: Work = QUIETLY,
    batch_size: int = 8,
) -> np.ndarray:
    question = Question(policy, observations, "c", QUANTIZER, batch_size=batch_size)
    return ExactEstimator().of_pairs(question, pairs, work)


def estimated(table: Sensitivities, pairs: list[ChannelWidth]) -> np.ndarray:
    return np.array([table.at(p.layer, p.bits)[p.channel] for p in pairs], np.float64)


def assert_same_deviations(estimate: np.ndarray, exact: np.ndarray) -> None:
    """Hold root sensitivities to 2 % plus what float32 rounding of the network moves."""
    np.testing.assert_allclose(np.sqrt(estimate), np.sqrt(exact), rtol=0.02, atol=5e-6)
    assert (np.sqrt(exact) > 2e-5).mean() > 0.3  # most of the comparison is not rounding


def test_first_order_equals_exact_for_small_changes(
    tiny_policy: OftPolicy, tiny_observations: Make, first_order: Sensitivities
) -> None:
    pairs = sampled(tiny_policy, 200, (8,))
    exact = exact_of(tiny_policy, tiny_observations(5), pairs)
    assert_same_deviations(estimated(first_order, pairs), exact)


def test_images_of_one_sample_add_up_before_squaring(
    tmp_path: Path, tiny_observations: Make
) -> None:
    config = replace(TINY_CONFIG, cameras=("image", "wrist"))
    policy = load_oft_policy(write_tiny_checkpoint(tmp_path / "two", config=config))
    observations = [
        replace(o, images={"image": o.images["image"], "wrist": o.images["image"][::-1].copy()})
        for o in tiny_observations(3)
    ]
    table = measure_first_order(policy, observations, "c", SETTINGS)
    pairs = [p for p in sampled(policy, 400, (8,)) if "featurizer" in p.layer]
    exact = exact_of(policy, observations, pairs)
    assert_same_deviations(estimated(table, pairs), exact)


def test_random_probes_are_unbiased(
    tiny_policy: OftPolicy, tiny_observations: Make, first_order: Sensitivities
) -> None:
    probes = 64
    settings = replace(SETTINGS, probes=probes, seed=3)
    table = measure_first_order(tiny_policy, tiny_observations(5), "calibration", settings)
    full = np.concatenate([v.ravel() for v in first_order.values.values()])
    random = np.concatenate([v.ravel() for v in table.values.values()])
    ratio = random[full > 0] / full[full > 0]
    # A channel's standard error is at most sqrt(2 / probes) = 0.18; probes are shared by channels.
    assert abs(ratio.mean() - 1) < 0.1
    assert ratio.std() < np.sqrt(2 / probes)
    assert table.probes == probes and first_order.probes == 0


def test_exact_equals_replacing_the_row(tiny_policy: OftPolicy, tiny_observations: Make) -> None:
    observations = tiny_observations(3)
    pairs = sampled(tiny_policy, 24, (0, 2))
    pairs += [ChannelWidth(name, 1, 0) for name in tiny_policy.layers() if "patch" in name]
    measured = exact_of(tiny_policy, observations, pairs, batch_size=2)
    layers = tiny_policy.layers()
    batch = tiny_policy.batch(observations)
    with torch.no_grad():
        reference = tiny_policy.normalized_actions(batch)
        for pair, value in zip(pairs, measured, strict=True):
            rows = weight_rows(layers[pair.layer])
            quantized = quantize_channels(rows[pair.channel][None], pair.bits, QUANTIZER)
            rows[pair.channel] = quantized.dequantize()[0]
            with replaced_weights(layers, {pair.layer: rows}):
                deviation = tiny_policy.normalized_actions(batch) - reference
            expected = deviation.square().sum().item() / len(observations)
            assert np.sqrt(value) == pytest.approx(np.sqrt(expected), rel=1e-3, abs=5e-6)
        assert torch.equal(tiny_policy.normalized_actions(batch), reference)


def test_deviations_are_exact_far_below_the_last_digit_of_float32(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    name, layer = next(iter(tiny_policy.layers().items()))
    before = layer.weight.detach().clone()
    batch = tiny_policy.batch(tiny_observations(2))
    change = torch.from_numpy(weight_rows(layer)[:1])
    with (
        in_float64(tiny_policy),
        recorded(tiny_policy, tiny_policy.layers(), batch_in_float64(batch)) as forward,
    ):
        small, smaller = (
            forward.deviations(name, [0], change.double() * step) for step in (1e-6, 1e-7)
        )
    # Squares of what is to first order.
    np.testing.assert_allclose(smaller, small / 100, rtol=1e-3)
    assert layer.weight.dtype == before.dtype and torch.equal(layer.weight, before)
    assert torch.get_default_dtype() is torch.float32


def test_what_plans_are_made_of_is_judged(tiny_policy: OftPolicy, tiny_observations: Make) -> None:
    """Exact measurement of codes that answer for errors takes those codes, not the nearest."""
    seen = tiny_observations(4)
    quantizer = replace(QUANTIZER, weighted_scales=True, compensation="inputs")
    fed = measure_moments(tiny_policy, seen, "c")
    how = FirstOrder(quantizer, (2, 4), None, 0, moments=fed)
    table = measure_first_order(tiny_policy, seen, "c", how)
    pairs = sampled(tiny_policy, 12, (2, 4))
    question = Question(tiny_policy, seen, "c", quantizer, moments=fed)
    exact = ExactEstimator().of_pairs(question, pairs)
    estimated = [float(table.at(p.layer, p.bits)[p.channel]) for p in pairs]
    nearest = ExactEstimator().of_pairs(replace(question, quantizer=QUANTIZER, moments=None), pairs)
    assert spearmanr(estimated, exact).statistic > 0.9
    assert not np.allclose(exact, nearest, rtol=1e-2)


def test_agreement_in_ranks_and_in_time(
    tiny_policy: OftPolicy,
    tiny_observations: Make,
    first_order: Sensitivities,
    tmp_path: Path,
) -> None:
    compared = compare_with_exact(first_order, tiny_policy, tiny_observations(5), pairs=200)
    assert compared.spearman > 0.95
    assert set(compared.spearman_by_width) == {"0", "2", "4", "8"}
    assert compared.time_ratio < 1 / 20
    compared.save(tmp_path / "agreement.json")
    assert Agreement.load(tmp_path / "agreement.json") == compared
    (tmp_path / "agreement.json").write_text("[]")
    with pytest.raises(ArtifactError, match="no agreement"):
        Agreement.load(tmp_path / "agreement.json")


def test_a_minutes_pairs_are_counted_in_cpu_time(
    tiny_policy: OftPolicy,
    tiny_observations: Make,
    first_order: Sensitivities,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a busy machine the clock goes on while the check waits."""
    count = {3.0: 120, 1e-9: 500, 600.0: 3}
    for taken_s, pairs in count.items():
        clock = iter((0.0, taken_s))
        cpu = SimpleNamespace(thread_time=partial(next, clock))
        monkeypatch.setattr(agreement, "time", cpu)
        assert pairs_in_a_minute(first_order, tiny_policy, tiny_observations(2)) == pairs


def test_a_failing_pass_leaves_the_policy_as_it_was(
    tiny_policy: OftPolicy, tiny_observations: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    observations = tiny_observations(2)
    before = tiny_policy.infer(observations[0]).actions

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exact_of(tiny_policy, observations, sampled(tiny_policy, 3, (0,)), Work(on_progress=stop))
    with pytest.raises(KeyboardInterrupt):
        measure_first_order(tiny_policy, observations, "c", SETTINGS, on_progress=stop)
    layers = tiny_policy.layers()
    name = next(iter(layers))
    with (
        pytest.raises(KeyboardInterrupt),
        replaced_weights(layers, {name: 0 * weight_rows(layers[name])}),
    ):
        raise KeyboardInterrupt
    assert all("forward" not in vars(layer) for layer in layers.values())
    assert all(not layer._forward_hooks for layer in layers.values())
    np.testing.assert_array_equal(tiny_policy.infer(observations[0]).actions, before)


def test_save_load_and_digest(first_order: Sensitivities, tmp_path: Path) -> None:
    path = tmp_path / "sensitivities.safetensors"
    first_order.save(path)
    loaded = Sensitivities.load(path)
    assert list(loaded.values) == list(first_order.values)
    for name, values in first_order.values.items():
        np.testing.assert_array_equal(loaded.values[name], values)
    assert loaded.digest == first_order.digest
    assert loaded.quantizer == QUANTIZER and loaded.samples == 5
    np.testing.assert_array_equal(loaded.at(name, 16), np.zeros(values.shape[1]))
    with pytest.raises(QvlaError, match="not at 3"):
        loaded.at(name, 3)


def test_standard_errors_are_kept_and_files_of_before_stay_the_same(
    first_order: Sensitivities, tmp_path: Path
) -> None:
    path = tmp_path / "sensitivities.safetensors"
    first_order.save(path)
    whole = Sensitivities.load(path).standard_error
    assert whole == first_order.standard_error
    assert whole.by_width.keys() == {"median layer", "worst layer", "all layers"}
    assert max(whole.by_width["worst layer"].error) == whole.layers >= whole.median > 0
    before = replace(first_order, standard_error=StandardError(0.5, 0.1, 0.3))
    before.save(path)
    assert b"median" not in path.read_bytes()
    loaded = Sensitivities.load(path)
    assert loaded.standard_error == before.standard_error
    assert loaded.standard_error.median is None and loaded.digest == before.digest


def test_damaged_files_are_refused(first_order: Sensitivities, tmp_path: Path) -> None:
    path = tmp_path / "sensitivities.safetensors"
    first_order.save(path)
    data = path.read_bytes()
    with pytest.raises(ArtifactError, match="not found"):
        Sensitivities.load(tmp_path / "absent")
    for damaged, message in (
        (data[:-100], "truncated or damaged"),
        (data[:4], "truncated or damaged"),
        (b"", "truncated or damaged"),
        (data[:-50] + bytes([data[-50] ^ 1]) + data[-49:], "checksum"),
        (data.replace(b"qvla-sensitivities-1", b"qvla-sensitivities-0"), "holds no sens"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=message):
            Sensitivities.load(path)


def test_sensitivities_lead_to_a_better_plan_than_one_width_for_all(
    tiny_policy: OftPolicy, tiny_observations: Make, first_order: Sensitivities
) -> None:
    held_out = tiny_policy.batch(tiny_observations(8, seed=1))
    shapes = layer_shapes(tiny_policy.layers())
    uniform = uniform_plan(shapes, 4, TARGET, tiny_policy.digest, QUANTIZER)
    planned = allocate_bits(first_order, Budget("bytes", uniform.weight_bytes), TARGET)
    errors = []
    with torch.no_grad():
        reference = tiny_policy.normalized_actions(held_out)
        for plan in (planned, uniform):
            with fake_quantized(tiny_policy, plan):
                moved = tiny_policy.normalized_actions(held_out) - reference
            errors.append(moved.square().sum().item())
    assert errors[0] < errors[1]
    other = replace(uniform, policy_digest="f" * 64)
    with pytest.raises(PlanMismatch), fake_quantized(tiny_policy, other):
        pass


@dataclass(frozen=True)
class PartOfPolicy:
    """A policy with only some of its layers quantizable."""

    whole: OftPolicy
    part: str

    @property
    def digest(self) -> str:
        return self.whole.digest

    @property
    def module(self) -> torch.nn.Module:
        return self.whole.module

    def batch(self, observations: list[Observation]) -> PolicyBatch:
        return self.whole.batch(observations)

    def normalized_actions(self, batch: PolicyBatch) -> torch.Tensor:
        return self.whole.normalized_actions(batch)

    def layers(self) -> dict[str, torch.nn.Module]:
        return {k: v for k, v in self.whole.layers().items() if self.part in k}


def test_exact_table_of_some_layers(tiny_policy: OftPolicy, tiny_observations: Make) -> None:
    policy = PartOfPolicy(tiny_policy, "layers.1.self_attn.")
    observations = tiny_observations(1)
    table = ExactEstimator().table(Question(policy, observations, "c", QUANTIZER, (0, 4)))
    quick = measure_first_order(policy, observations, "c", replace(SETTINGS, widths=(0, 4)))
    assert table.method == "exact" and table.widths == (0, 4) and len(table.values) == 8
    assert table.values.keys() == quick.values.keys()
    for name, values in table.values.items():
        assert spearmanr(values[1], quick.values[name][1]).statistic > 0.9, name


def test_bad_arguments_are_refused(tiny_policy: OftPolicy, tiny_observations: Make) -> None:
    with pytest.raises(QvlaError, match="at least one observation"):
        measure_first_order(tiny_policy, [], "c", SETTINGS)
    with pytest.raises(QvlaError, match="at least one observation"):
        exact_of(tiny_policy, [], [])
    with pytest.raises(QvlaError, match="no channel 5 of layer 'x'"):
        exact_of(tiny_policy, tiny_observations(1), [ChannelWidth("x", 5, 4)])
    with pytest.raises(QvlaError, match="at least 1"):
        FirstOrder(QUANTIZER, probes=0)

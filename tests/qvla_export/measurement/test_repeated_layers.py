"""Layers that run several times in a pass, as in the steps of a flow, are measured as one."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from linear_policies import PICTURE, QUANTIZER
from scipy.stats import spearmanr

from qvla_export.measurement.backward import Probes, recorded_pass
from qvla_export.measurement.measure_activations import measure_activations
from qvla_export.measurement.measure_moments import measure_moments
from qvla_export.measurement.moment_bounds import MomentSettings
from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.layers import Layer, replaced_weights, weight_rows
from qvla_export.quantizer.quantize import QuantizerSpec, WidthRule, fake_quantize
from qvla_export.sensitivity.estimators.base import ChannelWidth, Question
from qvla_export.sensitivity.estimators.exact import ExactEstimator
from qvla_export.sensitivity.estimators.first_order import (
    FirstOrder,
    FirstOrderEstimator,
    measure_first_order,
)
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

STEPS = 4
COMPENSATED = QuantizerSpec(
    {bits: WidthRule(None, "mse") for bits in (2, 4, 8)},
    weighted_scales=True,
    compensation="inputs and channels",
)


class Block(torch.nn.Module):
    """A module with a layer inside, whose input depends on what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 12), torch.nn.Linear(12, 6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + self.down(torch.tanh(self.up(tokens)))


class FlowNetwork(torch.nn.Module):
    """Reads once, then integrates a velocity over some steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = torch.nn.Linear(6, 6)
        self.block = Block()
        self.velocity = torch.nn.Linear(6, 6, bias=False)
        self.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        known = torch.tanh(self.read(tokens))
        flow = torch.zeros_like(known)
        for _ in range(STEPS):
            flow = flow + self.velocity(self.block(flow + known)) / STEPS
        return flow


@dataclass(frozen=True)
class FlowPolicy:
    module: FlowNetwork
    digest: str = "flow"

    def batch(self, observations: list[Observation]) -> PolicyBatch:
        states = torch.from_numpy(np.stack([o.state for o in observations]))
        return PolicyBatch(states.reshape(len(states), -1, 6), states.long(), None, states)

    def normalized_actions(self, batch: PolicyBatch) -> torch.Tensor:
        return self.module(batch.pixel_values)

    def layers(self) -> dict[str, Layer]:
        found = self.module.named_modules()
        return {name: layer for name, layer in found if isinstance(layer, torch.nn.Linear)}


@pytest.fixture(scope="module")
def question() -> Question:
    random = np.random.default_rng(1)
    observations = [
        Observation(PICTURE, "move", random.normal(size=24).astype(np.float32)) for _ in range(5)
    ]
    return Question(FlowPolicy(FlowNetwork()), observations, "c", QUANTIZER, batch_size=2)


def brute_force(question: Question, pair: ChannelWidth) -> float:
    """The definition: the channel is replaced, the whole policy runs."""
    policy = question.policy
    layer = policy.layers()[pair.layer]
    rows = weight_rows(layer)
    widths = np.full(len(rows), pair.bits)
    batch = policy.batch(question.observations)
    with torch.no_grad():
        reference = policy.normalized_actions(batch)
        changed = rows.copy()
        changed[pair.channel] = fake_quantize(rows, widths, QUANTIZER)[pair.channel]
        with replaced_weights(policy.layers(), {pair.layer: changed}):
            moved = policy.normalized_actions(batch) - reference
    return float(moved.double().square().sum() / len(question.observations))


def test_exact_sensitivities_count_every_step(question: Question) -> None:
    pairs = [
        ChannelWidth(name, channel, bits)
        for name in question.policy.layers()
        for channel in (0, 3)
        for bits in (0, 2, 4)
    ]
    measured = ExactEstimator().of_pairs(question, pairs)
    expected = [brute_force(question, pair) for pair in pairs]
    np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-12)
    assert min(expected) > 0


def test_first_order_is_near_exact(question: Question) -> None:
    question = replace(question, widths=(4, 8))
    exact = ExactEstimator().table(question)
    table = FirstOrderEstimator(probes=None).table(question)
    for name, values in exact.values.items():
        assert spearmanr(values.ravel(), table.values[name].ravel()).statistic > 0.97, name
        np.testing.assert_allclose(table.values[name][1], values[1], rtol=0.15, err_msg=name)


def test_moments_and_ranges_are_of_all_steps(question: Question) -> None:
    policy, observations = question.policy, question.observations
    one = MomentSettings(batch_size=1, probes=8)
    found = measure_moments(policy, observations, "c", one)
    whole = measure_moments(policy, observations, "c", replace(one, batch_size=5))
    mean = found.layers["block.up"].mean
    # Probes are drawn by batch, so that few of them weigh tokens alike but not equally.
    np.testing.assert_allclose(mean, whole.layers["block.up"].mean, atol=0.1)
    seen: list[torch.Tensor] = []
    handle = policy.layers()["block.up"].register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    policy.normalized_actions(policy.batch(observations))
    handle.remove()
    assert len(seen) == STEPS
    histograms = measure_activations(policy, observations, "c").histograms
    largest = float(torch.stack(seen).abs().max())
    assert histograms["block.up",].largest == pytest.approx(largest)
    assert histograms["block.up",].counts.sum() == STEPS * seen[0].numel()
    assert histograms["read",].counts.sum() == seen[0].numel()


def test_one_observation_does_not_make_all_moments(question: Question) -> None:
    """At the edge between two actions gradients are many times those of elsewhere."""

    class Edge(FlowNetwork):
        # Of the observation whose first number is largest, on which all else depends a lot.
        gain = 100.0

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            steep = tokens[:, 0, 0] == tokens[:, 0, 0].max()
            return super().forward(tokens) * torch.where(steep, self.gain, 1.0)[:, None, None]

    how = MomentSettings(batch_size=5, probes=8)
    policy, edge = FlowPolicy(FlowNetwork()), FlowPolicy(Edge())
    steepest = int(np.argmax([o.state[0] for o in question.observations]))
    others = [o for n, o in enumerate(question.observations) if n != steepest]
    largest = measure_moments(policy, [question.observations[steepest]], "c", how)
    without = measure_moments(policy, others, "c", how)
    found = measure_moments(edge, question.observations, "c", how)
    for name in edge.layers():
        # A product of squares would be 10,000 times the others; its root leaves them a share.
        means = [each.layers[name].mean for each in (without, largest, found)]
        apart = np.linalg.norm(means[1] - means[0])
        assert np.linalg.norm(means[2] - means[1]) > 0.01 * apart, name


def test_sensitivities_of_compensated_codes_count_observations_as_moments_do(
    question: Question,
) -> None:
    """A weighted mean of each observation's own, by the roots of their squared gradients."""
    policy, observations = question.policy, question.observations
    moments = measure_moments(policy, observations, "c", MomentSettings(batch_size=2))
    probes, energies = Probes(moments.probes, moments.seed), []
    for number, start in enumerate(range(0, len(observations), 2)):
        some = observations[start : start + 2]
        actions, calls = recorded_pass(policy, policy.layers(), some)
        flat, fed = actions.reshape(len(some), -1), calls.joined_inputs()
        signs, weight = probes.draw(flat, number)
        of_batch = torch.zeros(len(some))
        for sign in signs:
            found = torch.autograd.grad(flat, calls.targets, sign, retain_graph=True)
            for name, gradient in zip(policy.layers(), calls.joined(found), strict=True):
                token = gradient.square().sum(dim=-1) * fed[name].square().sum(dim=-1)
                of_batch += weight * token.sum(dim=1)
        energies += of_batch.tolist()
    np.testing.assert_allclose(moments.energies, energies, rtol=1e-4)
    shares = 1 / np.sqrt(energies)
    shares /= shares.mean()
    how = FirstOrder(COMPENSATED, (2, 4), batch_size=2, moments=moments)
    alike = replace(how, moments=replace(moments, energies=()))
    together = measure_first_order(policy, observations, "c", how)
    alone = [measure_first_order(policy, [o], "c", alike) for o in observations]
    for name, values in together.values.items():
        weighted = sum(s * one.values[name] for s, one in zip(shares, alone, strict=True))
        np.testing.assert_allclose(values, weighted / len(alone), rtol=1e-3, atol=1e-12)


def test_exact_sensitivities_count_observations_as_the_table_does(question: Question) -> None:
    """Or a table of compensated codes would be judged by another mean than its own."""
    policy, observations = question.policy, question.observations
    measured = measure_moments(policy, observations, "c", MomentSettings(batch_size=2))
    moments = replace(measured, energies=(1.0, 4.0, 9.0, 16.0, 25.0))
    compensated = replace(question, quantizer=COMPENSATED, moments=moments)
    pairs = [ChannelWidth(name, 3, 4) for name in policy.layers()]
    alike = replace(compensated, moments=replace(moments, energies=()))
    alone = [
        ExactEstimator().of_pairs(replace(alike, observations=[o]), pairs) for o in observations
    ]
    shares = moments.shares(len(observations))
    assert shares is not None
    together = ExactEstimator().of_pairs(compensated, pairs)
    np.testing.assert_allclose(together, np.average(alone, axis=0, weights=shares), rtol=1e-6)
    assert compensated.stated_shares and not question.stated_shares


def test_a_convolution_runs_once(question: Question) -> None:
    class Twice(FlowNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.picture = torch.nn.Conv2d(1, 1, 1).requires_grad_(False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.picture(self.picture(tokens[:, None]))[:, 0]

    network = Twice()

    class Conv(FlowPolicy):
        def layers(self) -> dict[str, Layer]:
            return {"picture": network.picture}

    with pytest.raises(QvlaError, match="picture runs more than once"):
        FirstOrderEstimator().table(replace(question, policy=Conv(network)))

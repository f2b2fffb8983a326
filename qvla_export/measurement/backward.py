"""One recorded pass of the policy and the gradients of its action at every layer's output.

Estimators of first order share it: they differ in how they bring a layer's gradient g and its
output error E of every width together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.measurement.recorded_calls import RecordedCalls, recording
from qvla_export.measurement.standard_error import add_moments
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import Layers, apply_rows, as_tokens
from qvla_export.shared.observation import Observation

# "full": (sum_t g E)^2. "norms": sum_t g^2 times sum_t E^2, eq. 6. "isotropic": sum_t g^2 times
# mean_t E^2, appendix G.
Contraction = Literal["full", "norms", "isotropic"]


@dataclass(frozen=True)
class Probes:
    """How the Jacobian of the action is probed: `count` random signs an observation, or whole."""

    count: int | None
    seed: int

    def draw(self, flat: Tensor, batch: int) -> tuple[list[Tensor], float]:
        """Return probes [B, outputs] of a batch and the weight of each.

        Args:
            flat: the actions.  [B, outputs]
            batch: its number; the same number draws the same signs in whatever process.
        """
        if self.count is None:
            identity = torch.eye(flat.shape[1], device=flat.device)
            return [row.expand_as(flat) for row in identity], 1.0
        generator = np.random.default_rng([self.seed, batch])
        signs = generator.integers(0, 2, (self.count, *flat.shape), dtype=np.int8) * 2.0 - 1.0
        return list(torch.from_numpy(signs).to(flat)), 1.0 / self.count


@dataclass(frozen=True)
class ProbedBatch:
    """Observations that go through a policy together, and the probes of their actions."""

    observations: Sequence[Observation]
    probes: Probes
    # Of all batches, from 0; seeds the probes.
    number: int
    # What each observation's deviations count, 1 on average; None for all alike.  float64 [B]
    shares: NDArray[np.float64] | None = None

    def draw(self, actions: Tensor) -> tuple[list[Tensor], float]:
        """Return the probes of the batch's actions [B, outputs] and the weight of each."""
        return self.probes.draw(actions, self.number)


@dataclass(frozen=True)
class WeightChanges:
    """What quantizing adds to the weights of some layers, and how it meets the gradients."""

    # Layer name -> width -> weight errors of the channels in question; at 0 bits they are the
    # negative weights and not looked at.  float32 [channels, inputs]
    errors: Mapping[str, Mapping[int, Tensor]]
    contraction: Contraction = "full"


def add_batch(
    policy: Policy,
    layers: Layers,
    batch: ProbedBatch,
    changes: WeightChanges,
    sums: Mapping[str, NDArray[np.float64]],
) -> None:
    """Add the squared deviations of all channels and widths of some layers on a batch to sums.

    Args:
        policy: its weights stay as they are.
        layers: to be estimated; the graph begins at the first of them.
        batch: observations and probes.
        changes: what each width adds to the weights of all channels of these layers.
        sums: see `standard_error.empty_sums`; `WHOLE` is of this batch. Added to in place.

    Raises:
        QvlaError: a convolution is called more than once in a pass.
    """
    moved = deviations(probed_pass(policy, layers, batch), changes)
    for name, layer_deviations in moved.items():
        layer_deviations.add_to(sums, name, batch)


@dataclass(frozen=True)
class Recorded:
    """What some layers take and return in a pass with a graph."""

    layers: Layers
    # Layer name -> detached inputs, those of several calls side by side; each is let go once it
    # has been used.
    inputs: dict[str, Tensor]
    outputs: Mapping[str, Tensor]
    # Observations of the pass.
    count: int
    # Layer name -> the channels in question; all of a layer that is not named.
    channels: Mapping[str, slice] = field(default_factory=dict)

    def channels_of(self, name: str) -> slice:
        """Return the channels of a layer that are in question."""
        return self.channels.get(name, slice(None))


@dataclass(frozen=True)
class Pass:
    """A way through a policy, or one observation's through a part of it, with a graph."""

    recorded: Recorded
    # Number of a probe -> gradients of probe . action at the outputs of the recorded layers. Every
    # probe has to be asked for, once and in order: earlier parts need what that brings.
    gradients: Callable[[int], Sequence[Tensor]]
    # Of the probes.
    weights: Sequence[float]


@dataclass(frozen=True)
class Deviations:
    """Squared deviations of the action on a batch, by channels of one layer."""

    # Mean over probes.  float64 [B, widths, channels]
    means: Tensor
    # Of each probe, the sum over the channels.  float64 [probes, B, widths]
    layer_sums: Tensor

    @staticmethod
    def joined(pieces: Sequence["Deviations"]) -> "Deviations":
        """Return those of all channels from those of consecutive ones."""
        means = torch.cat([piece.means for piece in pieces], dim=-1)
        return Deviations(means, torch.stack([piece.layer_sums for piece in pieces]).sum(dim=0))

    @staticmethod
    def of_batch(observations: Sequence["Deviations"]) -> "Deviations":
        """Return those of a batch from those of its observations."""
        means = torch.cat([each.means for each in observations])
        return Deviations(means, torch.cat([each.layer_sums for each in observations], dim=1))

    def add_to(
        self, sums: Mapping[str, NDArray[np.float64]], name: str, batch: ProbedBatch
    ) -> None:
        """Add to the sums of layer `name` what each observation of the batch counts."""
        means, layer_sums = self.means, self.layer_sums
        if batch.shares is not None:
            shares = torch.from_numpy(batch.shares).to(means)[:, None]
            means, layer_sums = means * shares[:, None], layer_sums * shares
        sums[name][:] += means.sum(dim=0).cpu().numpy()
        add_moments(sums, name, means, layer_sums, batch.probes.count is not None)


def deviations(probed: Pass, changes: WeightChanges) -> dict[str, Deviations]:
    """Return the squared deviations of the layers of a pass, by name.

    Args:
        probed: the pass; each probe's gradients are taken once, in order.
        changes: of the channels in question of each recorded layer.
    """
    recorded, contraction = probed.recorded, changes.contraction
    layers, count = recorded.layers, recorded.count
    noises = {}
    with torch.no_grad():
        for name in layers:
            noises[name] = _noise(_output_errors(recorded, name, changes), count, contraction)
    means: dict[str, Tensor] = {}
    layer_sums: dict[str, list[Tensor]] = {name: [] for name in layers}
    for number, weight in enumerate(probed.weights):
        for (name, layer), gradient in zip(layers.items(), probed.gradients(number), strict=True):
            tokens = as_tokens(layer, gradient)[..., recorded.channels_of(name)]
            squared = _contracted(tokens, noises[name], count, contraction)
            layer_sums[name].append(squared.sum(dim=-1))
            means[name] = means[name].add_(squared, alpha=weight) if number else weight * squared
    return {name: Deviations(means[name], torch.stack(layer_sums[name])) for name in layers}


def _output_errors(recorded: Recorded, name: str, changes: WeightChanges) -> list[Tensor]:
    """Return what each width's weight errors do to a layer's outputs.  [N, tokens, channels]"""
    layer, channels = recorded.layers[name], recorded.channels_of(name)
    inputs = recorded.inputs.pop(name)
    moved = []
    for bits, errors in changes.errors[name].items():
        if bits:
            moved.append(apply_rows(layer, inputs, errors))
        else:
            # All that the weights contribute is lost: known without another product.
            lost = as_tokens(layer, recorded.outputs[name].detach())[..., channels].neg()
            moved.append(lost if layer.bias is None else lost.add_(layer.bias.detach()[channels]))
    return moved


def _noise(errors: list[Tensor], count: int, contraction: Contraction) -> list[Tensor]:
    """Output errors of a layer, or what the norm products keep of them.

    [N, tokens, channels] each -> the same, or float64 [B, channels]
    """
    if contraction == "full":
        return errors
    squares = [error.reshape(count, -1, error.shape[-1]).square() for error in errors]
    powers = [s.sum(dim=1) if contraction == "norms" else s.mean(dim=1) for s in squares]
    return [values.double() for values in powers]


def _contracted(
    tokens: Tensor, noises: list[Tensor], count: int, contraction: Contraction
) -> Tensor:
    """Return the squared deviations of a probe.  float64 [B, widths, channels]"""
    if contraction == "full":
        # v . dA of each image; a sample's images add up before squaring. Products and sums by
        # themselves take a fifth of einsum's time, in one buffer less still.
        product = torch.empty_like(tokens)
        moved = [torch.mul(tokens, noise, out=product).sum(dim=1) for noise in noises]
        whole = torch.stack(moved, dim=1).reshape(count, -1, len(noises), tokens.shape[-1])
        return whole.sum(dim=1).double().square()
    gains = tokens.reshape(count, -1, tokens.shape[-1]).square().sum(dim=1)
    return gains.double()[:, None] * torch.stack(noises, dim=1)


def probed_pass(policy: Policy, layers: Layers, batch: ProbedBatch) -> Pass:
    """Run a batch forward with a graph and draw its probes.

    Raises:
        QvlaError: a convolution is called more than once.
    """
    actions, calls = recorded_pass(policy, layers, batch.observations)
    flat = actions.reshape(len(batch.observations), -1)
    probes, weight = batch.draw(flat)
    targets = calls.targets

    def gradients(number: int) -> Sequence[Tensor]:
        more = number + 1 < len(probes)
        found = torch.autograd.grad(flat, targets, grad_outputs=probes[number], retain_graph=more)
        return calls.joined(found)

    inputs, outputs = calls.joined_inputs(), calls.joined_outputs()
    recorded = Recorded(layers, inputs, outputs, len(batch.observations))
    return Pass(recorded, gradients, [weight] * len(probes))


def recorded_pass(
    policy: Policy, layers: Layers, observations: Sequence[Observation]
) -> tuple[Tensor, RecordedCalls]:
    """Run forward with a graph; return the actions and what each layer takes and returns.

    Raises:
        QvlaError: a convolution is called more than once.
    """
    # Before anything is recorded: a policy that decodes chooses its tokens here.
    batch = policy.batch(observations)
    with recording(layers) as calls, torch.enable_grad():
        actions = policy.normalized_actions(batch)
    return actions, calls

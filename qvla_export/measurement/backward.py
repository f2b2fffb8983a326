"""One recorded pass of the policy and the gradients of its action at every layer's output.

What the estimators of first order share: they differ in how they bring a layer's gradient g and
its output error E of every width together.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.measurement.standard_error import add_moments
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import apply_rows, as_tokens
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

Layers = Mapping[str, nn.Linear | nn.Conv2d]

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


def add_batch(
    policy: Policy,
    layers: Layers,
    errors: Mapping[str, Mapping[int, Tensor]],
    observations: Sequence[Observation],
    probes: Probes,
    batch: int,
    sums: Mapping[str, NDArray[np.float64]],
    contraction: Contraction = "full",
    means: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Add the squared deviations of all channels and widths of some layers on a batch to sums.

    Args:
        policy: its weights stay as they are.
        layers: to be estimated; the graph begins at the first of them.
        errors: layer name -> width -> weight errors of all channels; at 0 bits they are the
            negative weights and not looked at.  float32 [channels, inputs]
        observations: of the batch.
        probes: how the action's Jacobian is probed.
        batch: number of the batch, seeds its probes.
        sums: as `standard_error.empty_sums` makes them, `WHOLE` of this batch; added to in place.
        contraction: how gradients and errors come together.
        means: layer name -> mean input float32 [inputs], where a bias makes up for the mean error.

    Raises:
        QvlaError: a layer is called more than once in a pass.
    """
    made = probed_pass(policy, layers, observations, probes, batch)
    recorded = replace(made.recorded, means=means)
    moved = deviations(recorded, errors, made.gradients, made.weights, contraction)
    for name, found in moved.items():
        found.add_to(sums, name, probes.count is not None)


@dataclass(frozen=True)
class Recorded:
    """What some layers took and gave in a pass with a graph."""

    layers: Layers
    # Layer name -> detached inputs; each is let go once it was used.
    inputs: dict[str, Tensor]
    outputs: Mapping[str, Tensor]
    # Observations of the pass.
    count: int
    # Layer name -> mean input, where a bias makes up for the mean error.  float32 [inputs]
    means: Mapping[str, Tensor] = field(default_factory=dict)
    # Layer name -> the channels that are asked for; all of a layer that is not named.
    channels: Mapping[str, slice] = field(default_factory=dict)

    def of(self, name: str) -> slice:
        """Return the channels of a layer that are asked for."""
        return self.channels.get(name, slice(None))


@dataclass(frozen=True)
class Pass:
    """A way through a policy, or one observation's through a stage of it, with a graph."""

    recorded: Recorded
    # Number of a probe -> gradients of probe . action at the outputs of the recorded layers. Every
    # probe has to be asked for, once and in order: earlier stages need what that brings.
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

    def add_to(self, sums: Mapping[str, NDArray[np.float64]], name: str, sampled: bool) -> None:
        """Add to the sums of layer `name`; `sampled`: the probes are random."""
        sums[name][:] += self.means.sum(dim=0).cpu().numpy()
        add_moments(sums, name, self.means, self.layer_sums, sampled)


def deviations(
    recorded: Recorded,
    errors: Mapping[str, Mapping[int, Tensor]],
    gradients: Callable[[int], Sequence[Tensor]],
    weights: Sequence[float],
    contraction: Contraction = "full",
) -> dict[str, Deviations]:
    """Return the squared deviations of recorded layers, by name.

    Args:
        recorded: the pass.
        errors, contraction: as in `add_batch`; errors are of the channels that are asked for.
        gradients: number of a probe -> gradients of probe . action at each layer's output; asked
            once for each, in order.
        weights: of the probes.
    """
    layers, count = recorded.layers, recorded.count
    noises = {}
    with torch.no_grad():
        for name in layers:
            noises[name] = _noise(_output_errors(recorded, name, errors[name]), count, contraction)
    means: dict[str, Tensor] = {}
    layer_sums: dict[str, list[Tensor]] = {name: [] for name in layers}
    for number, weight in enumerate(weights):
        for (name, layer), gradient in zip(layers.items(), gradients(number), strict=True):
            tokens = as_tokens(layer, gradient)[..., recorded.of(name)]
            squared = _contracted(tokens, noises[name], count, contraction)
            layer_sums[name].append(squared.sum(dim=-1))
            means[name] = means[name].add_(squared, alpha=weight) if number else weight * squared
    return {name: Deviations(means[name], torch.stack(layer_sums[name])) for name in layers}


def _output_errors(recorded: Recorded, name: str, rows: Mapping[int, Tensor]) -> list[Tensor]:
    """Return what each width's weight errors do to a layer's outputs.  [N, tokens, channels]"""
    layer, channels = recorded.layers[name], recorded.of(name)
    inputs, mean = recorded.inputs.pop(name), recorded.means.get(name)
    made = []
    for bits, errors in rows.items():
        if bits:
            made.append(apply_rows(layer, inputs, errors))
        else:
            # All that the weights contribute is lost: known without another product.
            lost = as_tokens(layer, recorded.outputs[name].detach())[..., channels].neg()
            made.append(lost if layer.bias is None else lost.add_(layer.bias.detach()[channels]))
        if mean is not None:
            # What the mean input has in it goes into the bias.
            taken = errors if bits else -layer.weight.detach().flatten(1)[channels]
            made[-1] -= taken @ mean.to(taken.device)
    return made


def _noise(errors: list[Tensor], count: int, contraction: Contraction) -> list[Tensor]:
    """Output errors of a layer, or what the norm products keep of them.

    [N, tokens, channels] each -> the same, or float64 [B, channels]
    """
    if contraction == "full":
        return errors
    squares = [made.reshape(count, -1, made.shape[-1]).square() for made in errors]
    kept = [s.sum(dim=1) if contraction == "norms" else s.mean(dim=1) for s in squares]
    return [values.double() for values in kept]


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


def probed_pass(
    policy: Policy,
    layers: Layers,
    observations: Sequence[Observation],
    probes: Probes,
    batch: int,
) -> Pass:
    """Run a batch forward with a graph and draw its probes.

    Raises:
        QvlaError: a layer is called more than once.
    """
    actions, inputs, outputs = recorded_pass(policy, layers, observations)
    flat = actions.reshape(len(observations), -1)
    drawn, weight = probes.draw(flat, batch)
    targets = [outputs[name] for name in layers]

    def gradients(number: int) -> Sequence[Tensor]:
        more = number + 1 < len(drawn)
        return torch.autograd.grad(flat, targets, grad_outputs=drawn[number], retain_graph=more)

    recorded = Recorded(layers, inputs, outputs, len(observations))
    return Pass(recorded, gradients, [weight] * len(drawn))


def recorded_pass(
    policy: Policy, layers: Layers, observations: Sequence[Observation]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Run forward with a graph; return the actions and each layer's inputs and outputs.

    Raises:
        QvlaError: a layer is called more than once.
    """
    with recording(layers) as (inputs, outputs), torch.enable_grad():
        actions = policy.normalized_actions(policy.batch(observations))
    return actions, inputs, outputs


@contextlib.contextmanager
def recording(layers: Layers) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Yield what the layers are given and give while the block runs: detached inputs, outputs.

    Raises:
        QvlaError: a layer is called more than once.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if name in outputs:
                raise QvlaError(f"layer {name} runs more than once in a pass; not supported")
            # All parameters are frozen, so the graph has to begin at the first layers' outputs.
            if not output.requires_grad:
                output.requires_grad_(True)
            inputs[name] = arguments[0].detach()
            outputs[name] = output

        return record

    handles = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()

"""What all of a plan's weight errors do to the action together, to first order.

A channel's deviation has a sign before it is squared: v . dA = sum_t g[t, c] E[t, c] of an
observation and a probe v. Signed deviations add up over the channels of a layer, the layers of a
module and all of a plan, so that what errors do to each other is counted: E_v (v . dA)^2 is
||dA||^2 of all of them, where the sum of squares is of each by itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.measurement.backward import Pass, ProbedBatch, Probes, probed_pass
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import (
    Layers,
    apply_rows,
    as_tokens,
    planned_rows,
    traced_layers,
    weight_rows,
)
from qvla_export.quantizer.layer_names import module_of
from qvla_export.quantizer.plan import BitPlan
from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class PlanDeviation:
    """Deviations of the normalized action chunk by layer, observation and probe."""

    # Names of the layers.
    layers: tuple[str, ...]
    # v . dA of each layer alone, times the root of the probe's weight: squares add up over probes.
    # float32 [layers, observations, probes]
    signed: NDArray[np.float32]
    # Sum over a layer's channels of each one's E||dA||^2.  float64 [layers]
    channel_sums: NDArray[np.float64]

    @staticmethod
    def joined(pieces: Sequence["PlanDeviation"]) -> "PlanDeviation":
        """Return those of all observations from those of some each."""
        counts = [piece.signed.shape[1] for piece in pieces]
        sums = np.average([piece.channel_sums for piece in pieces], axis=0, weights=counts)
        return PlanDeviation(
            pieces[0].layers, np.concatenate([piece.signed for piece in pieces], axis=1), sums
        )

    def union(self, layers: Iterable[str] | None = None) -> float:
        """Return E||dA||^2 of some layers' errors together; of all by default."""
        chosen = self.layers if layers is None else tuple(layers)
        rows = [self.layers.index(name) for name in chosen]
        together = self.signed[rows].astype(np.float64).sum(axis=0)
        return float(np.square(together).sum(axis=1).mean())

    @property
    def modules(self) -> dict[str, tuple[str, ...]]:
        """Return the layers of each module, as `layer_names.module_of` has it."""
        found: dict[str, tuple[str, ...]] = {}
        for name in self.layers:
            found[module_of(name)] = (*found.get(module_of(name), ()), name)
        return found

    @property
    def union_over_modules(self) -> float:
        """Return E||dA||^2 of all errors over the sum of each module's; 1 where none interact."""
        parts = sum(self.union(names) for names in self.modules.values())
        return self.union() / parts if parts else 1.0

    def union_over_channels(self, layers: Sequence[str] | None = None) -> float:
        """Return E||dA||^2 of some layers over the sum of their channels'; of all by default."""
        names = self.layers if layers is None else layers
        parts = float(self.channel_sums[[self.layers.index(name) for name in names]].sum())
        return self.union(layers) / parts if parts else 1.0


def plan_deviation(
    policy: Policy,
    plan: BitPlan,
    observations: Sequence[Observation],
    probes: Probes,
    batch_size: int = 8,
) -> PlanDeviation:
    """Measure what a plan's weights do to the action, to first order.

    Activations count as float. Codes fit what they were made from, so other observations than those
    say what to expect.

    Args:
        policy: the full-precision policy, whole in memory; stays as it is.
        plan: with its codes.
        observations: at least one.
        probes: of the action.
        batch_size: observations that go through the policy together.
    """
    layers = traced_layers(policy)
    errors = {name: _errors(name, layers, plan) for name in plan.widths}
    signed, sums = [], np.zeros(len(errors))
    for number, start in enumerate(range(0, len(observations), batch_size)):
        batch = ProbedBatch(observations[start : start + batch_size], probes, number)
        found, squares = _of_pass(probed_pass(policy, layers, batch), errors)
        signed.append(found)
        sums += squares
    return PlanDeviation(
        tuple(errors), np.concatenate(signed, axis=1), sums / max(len(observations), 1)
    )


def _errors(name: str, layers: Layers, plan: BitPlan) -> Tensor:
    rows = weight_rows(layers[name])
    return torch.from_numpy(planned_rows(name, rows, plan) - rows).to(layers[name].weight.device)


def _of_pass(
    probed: Pass, errors: dict[str, Tensor]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return the signed deviations of a batch, and the sums of its channels' squares."""
    recorded, count = probed.recorded, probed.recorded.count
    with torch.no_grad():
        moved = {
            name: apply_rows(recorded.layers[name], recorded.inputs.pop(name), rows)
            for name, rows in errors.items()
        }
    signed = np.zeros((len(errors), count, len(probed.weights)), np.float32)
    squares = np.zeros(len(errors))
    for probe, weight in enumerate(probed.weights):
        gradients = dict(zip(recorded.layers, probed.gradients(probe), strict=True))
        for row, (name, noise) in enumerate(moved.items()):
            tokens = as_tokens(recorded.layers[name], gradients[name])
            of_tokens = (tokens * noise).sum(dim=1)
            of_channels = of_tokens.reshape(count, -1, noise.shape[-1]).sum(dim=1).double()
            signed[row, :, probe] = weight**0.5 * of_channels.sum(dim=1).cpu().numpy()
            squares[row] += weight * float(of_channels.square().sum())
    return signed, squares

"""Scales tuned together: they answer what the codes of all layers do to the action at once.

Codes are made layer by layer, each for its own error. What they do together has a sign, and it is
linear in the scales: with relative changes d of all stored scales, the row of an observation and a
probe v misses r + a . d, where r = v . (A_quantized - A_float) is exact and a_j is the gradient of
v . A by the weights that share scale j, times those weights, at the quantized policy. Ridge
regression makes that small: d = -A^T (A A^T + ridge)^-1 r, solved in the space of rows, of which
there are fewer than scales. The ridge is what predicts left-out observations best, and if none
predicts better than no change, nothing changes. Codes, widths and bytes stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.measurement.backward import Pass, ProbedBatch, Probes, probed_pass
from qvla_export.measurement.measure_moments import layer_tokens
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import (
    Layers,
    as_tokens,
    planned_rows,
    replaced_weights,
    traced_layers,
    weight_rows,
)
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.ridge_regression import least_changes
from qvla_export.quantizer.round_plan import require_rounded
from qvla_export.quantizer.rounding import Rounding
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

# Runs of consecutive observations that are left out in turn: of few episodes, mostly whole ones.
_FOLDS = 8
# Furthest that a scale is moved, relatively: what is linear in it is measured at no change.
_FURTHEST = 0.5
# Of the slopes of all rows, in float32.
_MOST_BYTES = 2 << 30


@dataclass(frozen=True)
class TuningSettings:
    """How many rows scales are tuned on."""

    # Random probes an observation at most: fewer where the slopes of all would not fit in memory.
    probes: int = 8
    seed: int = 0
    # Observations that run together.
    batch_size: int = 8


DEFAULT_TUNING = TuningSettings()


def tune_scales(
    policy: Policy,
    plan: BitPlan,
    observations: Sequence[Observation],
    shares: NDArray[np.float64] | None = None,
    settings: TuningSettings = DEFAULT_TUNING,
    tell: Callable[[int, int], None] | None = None,
) -> BitPlan:
    """Return a plan with the same codes at scales of less action error.

    Activations count as float.

    Args:
        policy: the full-precision policy, whole in memory; stays as it is.
        plan: with its codes.
        observations: those that the codes were made from, those of an episode in a row.
        shares: what each observation counts, see `quantizer.moments.shares_of`; None for all alike.
            float64 [observations]
        settings: probes, seed, batch size.
        tell: called with (observations done, observations in all).

    Raises:
        QvlaError: fewer than two observations, or the slopes of one probe exceed 2 GiB.
        PlanMismatch: the plan has no codes.
    """
    require_rounded(plan)
    if plan.rounding is None or len(observations) < 2:
        raise QvlaError(
            f"scales are tuned on 2 observations at least, got {len(observations)}: qvla calibrate"
        )
    grids = {name: _Grid.of(name, plan) for name in plan.widths}
    count = _probes_within(grids, len(observations), settings.probes)
    rows = _Rows.measured(policy, plan, grids, observations, replace(settings, probes=count), tell)
    fold = np.arange(len(observations)) * min(_FOLDS, len(observations)) // len(observations)
    if shares is not None:
        rows.count_as(np.sqrt(shares))
    slopes = rows.slopes.reshape(-1, rows.slopes.shape[2])
    changes = least_changes(slopes, rows.misses.flatten(), np.repeat(fold, count))
    return _changed(plan, plan.rounding, grids, changes)


@dataclass(frozen=True)
class _Grid:
    """Which weights of a layer share a scale."""

    # Inputs that stay in the graph, as it stores them.  int64 [kept]
    order: NDArray[np.int64]
    # Inputs of a group, in that order; channels have so many groups.
    group_size: int
    groups: int
    # Channels that have one scale for all their weights, and those that have any.  bool [channels]
    single: NDArray[np.bool_]
    scaled: NDArray[np.bool_]

    @staticmethod
    def of(name: str, plan: BitPlan) -> "_Grid":
        """Return that of a plan's layer.

        Raises:
            QvlaError: widths have groups of different sizes.
        """
        widths, order = plan.widths[name], plan.stored_order(name)
        single, scaled = np.zeros(len(widths), bool), (widths > 0) & (widths < 16)
        sizes = set()
        for bits in np.unique(widths[scaled]).tolist():
            rule = plan.quantizer.rule(bits)
            if rule.group_size is None or rule.two_level:
                single |= widths == bits
            else:
                sizes.add(rule.group_size)
        if len(sizes) > 1:
            raise QvlaError(
                f"scales are tuned where groups of all widths are of one size, got {sorted(sizes)}"
            )
        size = sizes.pop() if sizes else max(len(order), 1)
        return _Grid(order, size, max(-(-len(order) // size), 1), single, scaled)

    @property
    def scales(self) -> int:
        """Numbers a row has of this layer."""
        return int(self.scaled.sum()) * self.groups

    def summed(self, products: Tensor) -> Tensor:
        """Add up what the weights of each scale have.  [channels, inputs] -> [scales]"""
        kept = products[torch.from_numpy(self.scaled)][:, torch.from_numpy(self.order)]
        missing = self.groups * self.group_size - kept.shape[1]
        groups = torch.nn.functional.pad(kept, (0, missing)).reshape(
            len(kept), self.groups, self.group_size
        )
        sums = groups.sum(dim=2)
        whole = torch.from_numpy(self.single[self.scaled]).to(sums.device)
        sums[whole, 0] = sums[whole].sum(dim=1)
        sums[whole, 1:] = 0
        return sums.flatten()

    def factors(self, changes: NDArray[np.float64], groups: int) -> NDArray[np.float32]:
        """Return what scales are multiplied by.  [scales] -> float32 [channels, groups]"""
        factors = np.ones((len(self.scaled), groups), np.float32)
        moved = 1 + np.clip(changes, -_FURTHEST, _FURTHEST).reshape(-1, self.groups)
        factors[np.flatnonzero(self.scaled), : self.groups] = moved
        return factors


@dataclass(frozen=True)
class _Rows:
    """What each observation and probe misses, and how that goes with the scales."""

    # Times the root of a probe's weight.  float32 [observations, probes, scales]
    slopes: NDArray[np.float32]
    # The same of v . (A_quantized - A_float).  float64 [observations, probes]
    misses: NDArray[np.float64]

    @staticmethod
    def measured(
        policy: Policy,
        plan: BitPlan,
        grids: Mapping[str, _Grid],
        observations: Sequence[Observation],
        settings: TuningSettings,
        tell: Callable[[int, int], None] | None,
    ) -> "_Rows":
        """Measure them at the quantized policy, a batch at a time."""
        layers, probes = traced_layers(policy), Probes(settings.probes, settings.seed)
        rows = {name: planned_rows(name, weight_rows(layers[name]), plan) for name in plan.widths}
        shape = (len(observations), settings.probes)
        scales = sum(grid.scales for grid in grids.values())
        found = _Rows(np.empty((*shape, scales), np.float32), np.empty(shape))
        for number, start in enumerate(range(0, len(observations), settings.batch_size)):
            some = slice(start, start + settings.batch_size)
            batch = ProbedBatch(observations[some], probes, number)
            full = _actions(policy, batch)
            with replaced_weights(layers, rows):
                misses = _misses(_actions(policy, batch) - full, batch)
                found.misses[some] = misses.T
                weights = {name: torch.from_numpy(rows[name]).to(full.device) for name in rows}
                slopes = _slopes(probed_pass(policy, layers, batch), weights, grids)
                for probe, values in enumerate(slopes):
                    found.slopes[some, probe] = values.numpy()
            if tell is not None:
                tell(start + len(batch.observations), len(observations))
        return found

    def count_as(self, roots: NDArray[np.float64]) -> None:
        """Multiply the rows of each observation, in place.  float64 [observations]"""
        self.slopes[:] *= roots[:, None, None].astype(np.float32)
        self.misses[:] *= roots[:, None]


def _probes_within(grids: Mapping[str, _Grid], observations: int, most: int) -> int:
    """Return how many probes an observation fit into memory.

    Raises:
        QvlaError: not one.
    """
    of_probe = 4 * observations * sum(grid.scales for grid in grids.values())
    if of_probe > _MOST_BYTES:
        raise QvlaError(
            f"tuning scales on {observations} observations takes {of_probe / 2**30:.1f} GiB, at "
            f"most {_MOST_BYTES / 2**30:.0f} are taken; plan without --tune-scales, or calibrate "
            "on fewer observations"
        )
    return max(1, min(most, _MOST_BYTES // max(of_probe, 1)))


def _actions(policy: Policy, batch: ProbedBatch) -> Tensor:
    """Return normalized actions.  [B, numbers]"""
    with torch.no_grad():
        actions = policy.normalized_actions(policy.batch(batch.observations))
    return actions.reshape(len(batch.observations), -1)


def _misses(difference: Tensor, batch: ProbedBatch) -> NDArray[np.float64]:
    """Return what each probe sees of a difference of actions [B, numbers].  [probes, B]"""
    probes, weight = batch.draw(difference)
    seen = [weight**0.5 * (probe * difference).sum(dim=1).double().cpu() for probe in probes]
    return np.stack([one.numpy() for one in seen])


def _slopes(
    probed: Pass, weights: Mapping[str, Tensor], grids: Mapping[str, _Grid]
) -> Iterator[Tensor]:
    """Yield the slopes of each probe, times the root of its weight.  float32 [B, scales]"""
    recorded = probed.recorded
    layers, count = recorded.layers, recorded.count
    inputs = {name: _by_observation(layers, name, recorded.inputs[name], count) for name in grids}
    for number, weight in enumerate(probed.weights):
        gradients = dict(zip(layers, probed.gradients(number), strict=True))
        parts = []
        for name, grid in grids.items():
            tokens = as_tokens(layers[name], gradients[name])
            gains = tokens.reshape(count, -1, tokens.shape[-1])
            # One observation after another: a whole weight's gradient each.
            of_layer = [
                grid.summed((gain.T @ fed) * weights[name])
                for gain, fed in zip(gains, inputs[name], strict=True)
            ]
            parts.append(torch.stack(of_layer))
        yield (weight**0.5 * torch.cat(parts, dim=1)).cpu()


def _by_observation(layers: Layers, name: str, inputs: Tensor, count: int) -> Tensor:
    """Return what a layer's output tokens are maps of.  [B, tokens, inputs]"""
    tokens = layer_tokens(layers[name], inputs)
    return tokens.reshape(count, -1, tokens.shape[-1])


def _changed(
    plan: BitPlan,
    rounding: Rounding,
    grids: Mapping[str, _Grid],
    changes: NDArray[np.float64],
) -> BitPlan:
    layers, start = {}, 0
    for name, grid in grids.items():
        old = rounding.layers[name]
        own = changes[start : start + grid.scales]
        start += grid.scales
        factors = grid.factors(own, old.scales.shape[1])
        layers[name] = old.with_scales(factors, plan.widths[name], plan.quantizer)
    return replace(plan, rounding=replace(rounding, layers=layers))

"""What a deployment repeats, done once with its own code: CPU seconds on this machine.

Multiply-adds foretell large policies. Of small ones most is Python's part and work without a
number of its own, so a policy that is in memory is tried on one batch.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from qvla_export.quantizer.quantize import compensated_spec, spec_for
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from qvla_export.measurement.backward import ProbedBatch
    from qvla_export.policies.base import Policy
    from qvla_export.policies.layers import Layers
    from qvla_export.quantizer.moments import Moments
    from qvla_export.quantizer.quantize import QuantizerSpec
    from qvla_export.shared.observation import Observation

_WIDTHS = (0, 2, 4, 8)
# Layers of which a channel is changed by itself, from the first to the last; times of acting.
_CHANGED_LAYERS, _ACTS = 4, 3


@dataclass(frozen=True)
class TrialWork:
    """How the deployment measures, as far as that changes what it takes."""

    target: Target
    compensated: bool
    # Random probes of an observation; None for every number of the action.
    probes: int | None
    # Observations that run together.
    batch_size: int
    # Of sensitivities' groups of layers; None for no bound.
    max_bytes: int | None
    # Whether a setting rounds what layers are fed.
    rounds_inputs: bool = False


@dataclass(frozen=True)
class Trial:
    """CPU seconds of what a deployment of a policy in memory repeats."""

    # Observations of the batch that was tried.
    batch_size: int
    # Of an observation that acts by itself.
    acts_s: float
    # Of a batch: its moments, its sensitivities; those of layers that stay in 16 bits.
    moments_s: float
    sensitivities_s: float
    kept_s: float
    # Of an observation whose layers' inputs are recorded; how many inputs differ. 0 where no
    # setting rounds them.
    activations_s: float
    activation_groups: int
    # Of all layers: errors of every width's codes; codes of a plan.
    errors_s: float
    rounding_s: float
    # Of a batch: recording it for exact measurement; one channel changed at one width.
    recording_s: float
    pair_s: float
    # Threads that such a pair keeps busy.
    pair_threads: float = 1.0

    def batches(self, observations: int) -> int:
        """Return how many batches so many observations make."""
        return -(-observations // self.batch_size)


def try_policy(policy: "Policy", observation: "Observation", work: TrialWork) -> Trial:
    """Do what a deployment repeats, each once, and return how long that took.

    Args:
        policy: in memory, where it measures; stays as it is.
        observation: like those that are measured on.
        work: of the deployment.

    Raises:
        QvlaError: the policy's layers do not fit the work.
    """
    from qvla_export.policies.layers import traced_layers

    layers, some = traced_layers(policy), [observation] * work.batch_size
    acts_s = _acting_s(policy, observation)
    spec = compensated_spec(work.target) if work.compensated else spec_for(work.target)
    fed, moments_s = _moments(policy, layers, some) if work.compensated else (None, 0.0)
    errors, errors_s = _errors(layers, spec, fed)
    exact = _exact_s(policy, layers, some)
    recorded = _recorded(policy, observation) if work.rounds_inputs else (0.0, 0)
    return Trial(
        work.batch_size,
        acts_s,
        moments_s,
        _sensitivities_s(policy, layers, some, errors, work),
        _kept_s(policy, some, work.target),
        *recorded,
        errors_s,
        0.0 if fed is None else _rounding_s(layers, spec, fed),
        *exact,
    )


def _acting_s(policy: "Policy", observation: "Observation") -> float:
    import torch

    def act() -> None:
        with torch.no_grad():
            policy.greedy_actions(policy.batch([observation]))

    act()
    return statistics.median(_seconds(act) for _ in range(_ACTS))


def _moments(
    policy: "Policy", layers: "Layers", some: "Sequence[Observation]"
) -> "tuple[Moments, float]":
    """Return a batch's moments, and the seconds of adding them up."""
    from qvla_export.measurement.backward import probed_pass
    from qvla_export.measurement.measure_moments import add_pass, layer_moments
    from qvla_export.measurement.moment_bounds import DEFAULT_MOMENTS, moment_sums
    from qvla_export.quantizer.moments import Moments

    sums, batch = moment_sums(layers, DEFAULT_MOMENTS), _probed(some, DEFAULT_MOMENTS.probes)
    taken = _seconds(lambda: add_pass(probed_pass(policy, layers, batch), sums))
    made = {name: layer_moments(sums, name) for name in layers}
    return Moments(made, len(some), DEFAULT_MOMENTS.probes, 0, policy.digest, ""), taken


def _errors(
    layers: "Layers", spec: "QuantizerSpec", fed: "Moments | None"
) -> "tuple[Mapping[str, Mapping[int, Tensor]], float]":
    """Return errors of layers, those of the first of a shape for all, and all layers' seconds."""
    from qvla_export.measurement.weight_errors import weight_errors

    errors: dict[str, Mapping[int, Tensor]] = {}
    taken = 0.0
    for alike in _alike(layers):
        began = time.process_time()
        own = weight_errors(alike[0], layers[alike[0]], _WIDTHS, spec, fed)
        taken += len(alike) * (time.process_time() - began)
        errors |= dict.fromkeys(alike, own)
    return errors, taken


def _sensitivities_s(
    policy: "Policy",
    layers: "Layers",
    some: "Sequence[Observation]",
    errors: "Mapping[str, Mapping[int, Tensor]]",
    work: TrialWork,
) -> float:
    from qvla_export.measurement.backward import WeightChanges, add_batch
    from qvla_export.measurement.layer_groups import layer_groups
    from qvla_export.measurement.standard_error import WHOLE, empty_sums, empty_whole
    from qvla_export.measurement.weight_errors import error_needs

    spec = compensated_spec(work.target) if work.compensated else spec_for(work.target)
    groups = layer_groups(policy, layers, some, error_needs(spec, _WIDTHS), work.max_bytes)
    batch, taken = _probed(some, work.probes), 0.0
    for names in groups:
        group = {name: layers[name] for name in names}
        changes = WeightChanges({name: errors[name] for name in names})
        sums = empty_sums({name: len(x.weight) for name, x in group.items()}, len(_WIDTHS))
        sums[WHOLE] = empty_whole(work.probes, len(some), len(_WIDTHS))
        taken += _seconds(partial(add_batch, policy, group, batch, changes, sums))
    return taken


def _kept_s(policy: "Policy", some: "Sequence[Observation]", target: Target) -> float:
    from qvla_export.pipeline.deployment.kept_layers import kept_question
    from qvla_export.sensitivity.estimators.first_order import measure_first_order

    if not policy.kept_layers():
        return 0.0
    return _seconds(lambda: measure_first_order(policy, some, "", kept_question(target)))


def _rounding_s(layers: "Layers", spec: "QuantizerSpec", fed: "Moments") -> float:
    import numpy as np

    from qvla_export.policies.layers import layer_shapes, weight_rows
    from qvla_export.quantizer.compensation import round_layer

    taken, shapes = 0.0, layer_shapes(layers)
    for alike in _alike(layers):
        name, (channels, inputs) = alike[0], shapes[alike[0]]
        rows, own = weight_rows(layers[name]), fed.of(name, shapes[name])
        widths, order = np.full(channels, 4, np.int8), np.arange(inputs)
        began = time.process_time()
        round_layer(rows, widths, spec, own, order)
        taken += len(alike) * (time.process_time() - began)
    return taken


def _recorded(policy: "Policy", observation: "Observation") -> tuple[float, int]:
    from qvla_export.measurement.measure_activations import measure_activations

    began = time.process_time()
    found = measure_activations(policy, [observation], "")
    return time.process_time() - began, len(found.histograms)


def _exact_s(
    policy: "Policy", layers: "Layers", some: "Sequence[Observation]"
) -> tuple[float, float, float]:
    """Return the seconds of recording a batch, of one channel changed on it, and its threads."""
    import torch

    from qvla_export.measurement.double_precision import batch_in_float64, in_float64
    from qvla_export.measurement.partial_forward import recorded
    from qvla_export.policies.layers import weight_rows

    names = list(layers)
    chosen = names[:: -(-len(names) // _CHANGED_LAYERS)]
    began = time.process_time()
    inputs = batch_in_float64(policy.batch(some))
    with in_float64(policy), recorded(policy, layers, inputs) as forward:
        recording_s, began = time.process_time() - began, time.process_time()
        own_began = time.thread_time()
        for name in chosen:
            row = torch.from_numpy(weight_rows(layers[name], slice(1)))
            forward.deviations(name, [0], row.to(forward.reference))
        changed_s, own_s = time.process_time() - began, time.thread_time() - own_began
        return recording_s, changed_s / len(chosen), max(changed_s / max(own_s, 1e-6), 1.0)


def _alike(layers: "Layers") -> list[list[str]]:
    """Return the names of layers, those of one shape together."""
    from qvla_export.policies.layers import layer_shapes

    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, shape in layer_shapes(layers).items():
        by_shape.setdefault(shape, []).append(name)
    return list(by_shape.values())


def _probed(some: "Sequence[Observation]", probes: int | None) -> "ProbedBatch":
    from qvla_export.measurement.backward import ProbedBatch, Probes

    return ProbedBatch(some, Probes(probes, 0), 0)


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began

"""What steps take that only a policy in memory has: exact sensitivities, activations, latency."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.sizing.step_costs import (
    OPENING_S,
    StepCosts,
    Workload,
    alone_seconds,
    moment_bytes,
    moment_costs,
    sensitivity_costs,
)
from qvla_export.pipeline.sizing.trial import Trial, TrialWork, try_policy
from qvla_export.quantizer.rounding_costs import rounding_cost

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy
    from qvla_export.shared.observation import Observation

# A trial that would take longer is left out: arithmetic is most of what such a policy does.
_LONGEST_TRIAL_S = 20.0
# Bytes in files: of a pair, of an action that was timed.
_PAIR_BYTES, _SAMPLE_BYTES = 90, 65
_KEPT_PROBES, _KEPT_WIDTHS, _COUNTED = 4, 3, 3
_LARGEST_BLOCK = 4096
# Passes of a batch whose moments are measured; those of a step of tuning, and what it does to each
# weight: its gradient, a code and its rounding, Adam's two means.
_MOMENT_PASSES, _TUNING_PASSES, _TUNING_PRODUCTS = 5, 2, 16
_TUNED_BYTES = 5 * 4


def tried(
    work: Workload, policy: "Policy", observation: "Observation", trial: TrialWork
) -> Workload:
    """Return a workload with what a batch took, where that is quickly found.

    Args:
        work: what is done.
        policy: held as the deployment holds it.
        observation: like those that are measured on.
        trial: how the deployment measures.
    """
    if not work.resident or _trial_s(work, trial.batch_size) > _LONGEST_TRIAL_S:
        return work
    return replace(work, trial=try_policy(policy, observation, trial))


def with_tuning(work: Workload, rounding: StepCosts) -> StepCosts:
    """Return the costs of codes that are tuned together once they are made.

    Args:
        work: what is done.
        rounding: what making them takes.
    """
    from qvla_export.measurement.code_tuning import DEFAULT_TUNING

    size, steps = DEFAULT_TUNING.batch_size, DEFAULT_TUNING.steps(work.count)
    weights = sum(layer.weights for layer in work.policy.layers)
    if work.trial is None:
        passes_s = work.passes_s(size, _TUNING_PASSES - 1)
    else:
        share = _TUNING_PASSES / _MOMENT_PASSES * size / work.trial.batch_size
        passes_s = share * work.trial.moments_s
    step_s = passes_s + _TUNING_PRODUCTS * weights / work.rates.numbers_per_s
    passing = work.pass_bytes() * size // work.batch_size
    return replace(
        rounding,
        cpu_s=(rounding.cpu_s or 0.0) + steps * step_s,
        memory_bytes=rounding.memory_bytes + _TUNED_BYTES * weights + passing,
    )


def kept_costs(work: Workload, channels: int) -> StepCosts:
    """Return what sensitivities of the layers that stay in 16 bits take.

    Args:
        work: what is done.
        channels: of these layers.
    """
    from qvla_export.pipeline.deployment.kept_layers import KEPT_OBSERVATIONS

    seen = min(KEPT_OBSERVATIONS, work.count)
    if work.trial is None:
        taken = work.passes_s(seen, _KEPT_PROBES)
    else:
        taken = work.trial.batches(seen) * work.trial.kept_s
    disk = 4 * _KEPT_WIDTHS * channels
    return StepCosts("kept layers", taken, work.pass_bytes(), disk)


def agreement_costs(work: Workload, check_pairs: int | None) -> StepCosts:
    """Return what comparing with exact sensitivities takes.

    Args:
        work: what is done.
        check_pairs: (channel, width) pairs; None for a minute's.
    """
    from qvla_export.sensitivity.agreement import TIMED_PAIRS, pairs_of_a_minute

    trial = work.trial or _guessed_trial(work)
    layers = len(work.policy.layers)

    def exact_s(pairs: int) -> float:
        batches = trial.batches(work.count)
        passes = batches * (trial.recording_s + pairs * trial.pair_s)
        # Codes are made of whole layers, of those that a pair is of.
        return passes + min(1.0, pairs / layers) * trial.errors_s

    first, pairs = 0.0, check_pairs
    if pairs is None:
        first = exact_s(TIMED_PAIRS)
        pairs = pairs_of_a_minute(first / TIMED_PAIRS / trial.pair_threads)
    # The table's own time is taken on a batch.
    taken = first + exact_s(pairs) + trial.errors_s + trial.sensitivities_s
    # Weights in float64, and a batch's recorded pass in it.
    exact_bytes = 2 * (work.policy.weight_bytes + work.pass_bytes())
    exact_bytes += moment_bytes(work) if work.compensated else 0
    memory = max(exact_bytes, sensitivity_costs(work).memory_bytes)
    return StepCosts("agreement with exact", taken, memory, _PAIR_BYTES * pairs)


def activation_costs(work: Workload) -> StepCosts:
    """Return what recording the layers' inputs takes, observation by observation."""
    from qvla_export.quantizer.activation_statistics import BINS

    moved = sum(layer.numbers_in for layer in work.policy.layers)
    # |x|, its bin, a count.
    counted_s = _COUNTED * moved / work.rates.numbers_per_s
    each_s = work.alone_s(1) + counted_s if work.trial is None else work.trial.activations_s
    groups = len(work.policy.layers)
    if work.trial is not None:
        groups = work.trial.activation_groups
    return StepCosts("activations", work.count * each_s, work.pass_bytes(), 8 * BINS * groups)


def latency_costs(work: Workload, settings: Sequence[Setting], samples: int) -> StepCosts:
    """Return what timing takes: every setting, planned ones unpacked too, the last over HTTP."""
    from jetson.latency.measure import WARMUP_ROUNDS

    engines = len(settings) + sum(setting.kind == "planned" for setting in settings)
    actions = (engines + 1) * (WARMUP_ROUNDS + samples)
    taken = engines * OPENING_S + work.alone_s(actions)
    memory = 2 * len(settings) * work.policy.weight_bytes
    return StepCosts("latency", taken, memory, _SAMPLE_BYTES * (engines + 1) * samples)


def _guessed_trial(work: Workload) -> Trial:
    """Return what arithmetic says of a batch; exact passes are of float64, half as fast."""
    size = min(work.batch_size, work.count)
    pass_s = work.passes_s(size, 0)
    errors_s = sum(alone_seconds(layer, work.rates) for layer in work.policy.layers)
    return Trial(
        batch_size=size,
        acts_s=work.alone_s(1),
        moments_s=0.0,
        sensitivities_s=work.passes_s(size, work.probes),
        kept_s=0.0,
        activations_s=0.0,
        activation_groups=0,
        errors_s=errors_s if work.compensated else 0.0,
        rounding_s=0.0,
        recording_s=2 * pass_s,
        # A channel changes what comes after its layer: half of a pass on average.
        pair_s=pass_s,
    )


def _trial_s(work: Workload, batch_size: int) -> float:
    """Return about how long a trial takes, by arithmetic."""
    one, rates = replace(work, count=batch_size), work.rates
    shapes = {(layer.channels, layer.inputs): layer for layer in work.policy.layers}
    codes = sum(
        alone_seconds(layer, rates)
        + rounding_cost(layer.channels, layer.inputs, _LARGEST_BLOCK, 64).cpu_s(rates.rounding)
        for layer in shapes.values()
    )
    moments = moment_costs(one).cpu_s or 0.0
    return codes + moments + one.passes_s(2 * batch_size, work.probes)

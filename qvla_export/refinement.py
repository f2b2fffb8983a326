"""Plan again on the quantized policy: what changing each channel does to the action error there.

A plan's additive error takes channels to disturb the action independently; what they do to it
together can be several times as much. At the plan itself the action error is E||e||^2 with
e = A_quantized - A, and giving channel c another width moves the action by d, so that the error
changes by E[2 e . d] + E||d||^2. The first part is exact to first order for all channels and widths
at once: the gradient of the action error with respect to the weights, times the change of the
weights. The second part, of independent channels, is known from the sensitivities. It bounds how
far one round goes: `caution` times as much is charged, and of several cautions the one whose plan
has the least measured error on the same observations is taken, if that is less than before.

Everything is in memory at once: float weights, weights in place and gradients of all layers.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.coupling import find_couplings
from qvla_export.errors import ArtifactError, QvlaError
from qvla_export.layers import fake_quantized, planned_rows, traced_layers, weight_rows
from qvla_export.observation import Observation
from qvla_export.plan import BitPlan
from qvla_export.policies.base import Policy
from qvla_export.sensitivity import Sensitivities

# The first round's, and by what further ones try more and less.
_CAUTION = 100.0
_STEP = 3.0
# What a plan's record calls its refinement.
_KEY = "refinement"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """One round: what was tried, and whether the plan was taken."""

    caution: float
    # Channels whose width it changes.
    changed: int
    # E||dA||^2 on the observations, before and with the round's best plan.
    error_before: float
    error_after: float

    @property
    def accepted(self) -> bool:
        """Whether the error fell."""
        return self.error_after < self.error_before


def refine_plan(
    policy: Policy,
    observations: Sequence[Observation],
    measured: Sensitivities,
    plan: BitPlan,
    allocate: Callable[[Sensitivities], BitPlan],
    rounds: int,
    journal: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    batch_size: int = 8,
) -> BitPlan:
    """Return a plan of no more measured action error, its rounds in `allocation`.

    Args:
        policy: float32; its weights are as before afterwards.
        observations: at least one; those that the sensitivities were measured on.
        measured: the sensitivities.
        plan: what to begin with.
        allocate: from a table in the place of `measured`; keeps whatever limits there are.
        rounds: at most so many; fewer once two in turn found nothing.
        journal: the plan so far is saved here after each round; a killed run that finds it goes on.
        on_progress: called with (rounds done, rounds in all).
        batch_size: observations that run together.

    Raises:
        QvlaError: no observations, or no round.
    """
    if not observations or rounds < 1:
        raise QvlaError(
            f"refining needs observations and at least one round, got {len(observations)} and "
            f"{rounds}"
        )
    batches = [observations[i : i + batch_size] for i in range(0, len(observations), batch_size)]
    with torch.no_grad():
        reference = [policy.normalized_actions(policy.batch(batch)) for batch in batches]
    start = plan.digest
    error = _action_error(policy, batches, reference, plan)
    plan, done = _resumed(journal, start) or (plan, [])
    for number in range(len(done), rounds):
        if [r.accepted for r in done[-2:]] == [False, False]:
            break
        last = done[-1] if done else Round(_CAUTION, 0, error, error)
        before = min(last.error_before, last.error_after)
        # After a round that found nothing, smaller steps.
        caution = last.caution * (_STEP**2 if done and not last.accepted else 1.0)
        slopes = error_slopes(policy, batches, reference, plan)
        found: list[tuple[float, float, BitPlan]] = []
        for tried in (caution / _STEP, caution, caution * _STEP):
            other = allocate(_table(measured, plan, slopes, tried))
            found.append((_action_error(policy, batches, reference, other), tried, other))
        after, tried, other = min(found, key=lambda each: each[0])
        done.append(Round(tried, _changed(plan, other), before, after))
        _log.debug("round %d: %s", number + 1, done[-1])
        plan = _recorded(other if done[-1].accepted else plan, measured, start, done)
        if journal is not None:
            plan.save(journal)
        if on_progress is not None:
            on_progress(number + 1, rounds)
    return plan


def _action_error(
    policy: Policy,
    batches: Sequence[Sequence[Observation]],
    reference: Sequence[Tensor],
    plan: BitPlan,
) -> float:
    """Measure E||dA||^2 of a plan, weights fake-quantized."""
    total = 0.0
    with torch.no_grad(), fake_quantized(policy, plan):
        for batch, expected in zip(batches, reference, strict=True):
            moved = policy.normalized_actions(policy.batch(batch)) - expected
            total += float(moved.double().square().sum())
    return total / sum(map(len, batches))


def error_slopes(
    policy: Policy,
    batches: Sequence[Sequence[Observation]],
    reference: Sequence[Tensor],
    plan: BitPlan,
) -> dict[str, NDArray[np.float64]]:
    """Return the first-order change of the action error for each channel and width.

    Args:
        policy: float32.
        batches: of observations.
        reference: normalized actions of the float policy on each batch.
        plan: where the action error is derived.

    Returns:
        Layer name -> E[2 e . d], zero at the plan's own width.  float64 [widths, channels]
    """
    layers = traced_layers(policy)
    originals = {name: weight_rows(layer) for name, layer in layers.items()}
    with fake_quantized(policy, plan):
        now = {name: weight_rows(layer) for name, layer in layers.items()}
        gradients = _error_gradients(policy, batches, reference, list(layers.items()))
    couplings = {c.consumer: c for c in find_couplings(plan.widths, plan.weights_per_channel)}
    slopes = {}
    for name, rows in originals.items():
        slope = np.empty((len(_widths(plan)), len(rows)))
        for i, bits in enumerate(_widths(plan)):
            # The couplings stay: the order of inputs does not depend on the consumer's own widths.
            uniform = replace(plan, widths={**plan.widths, name: np.full(len(rows), bits, np.int8)})
            change = planned_rows(name, rows, uniform, couplings) - now[name]
            slope[i] = np.einsum("ci,ci->c", change, gradients[name], dtype=np.float64)
        slopes[name] = slope
    return slopes


def _error_gradients(
    policy: Policy,
    batches: Sequence[Sequence[Observation]],
    reference: Sequence[Tensor],
    layers: Sequence[tuple[str, Any]],
) -> dict[str, NDArray[np.float32]]:
    """Gradient of E||e||^2 with respect to the weights in place.  float32 [channels, inputs]"""
    weights = [layer.weight for _, layer in layers]
    sums = [torch.zeros_like(weight) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for batch, expected in zip(batches, reference, strict=True):
                moved = policy.normalized_actions(policy.batch(batch)) - expected
                found = torch.autograd.grad(moved.square().sum(), weights)
                for total, gradient in zip(sums, found, strict=True):
                    total += gradient
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    count = sum(map(len, batches))
    return {
        name: (total / count).reshape(len(total), -1).cpu().numpy()
        for (name, _), total in zip(layers, sums, strict=True)
    }


def _table(
    measured: Sensitivities, plan: BitPlan, slopes: dict[str, NDArray[np.float64]], caution: float
) -> Sensitivities:
    """Return changes of the error in the place of sensitivities, each channel's least one zero."""
    values = {}
    widths = _widths(plan)
    for name, slope in slopes.items():
        alone = np.stack([_at(measured, name, bits) for bits in widths])
        here = np.searchsorted(widths, plan.widths[name])
        channels = np.arange(len(here))
        # Rounding errors of two widths are independent of each other.
        further = alone + alone[here, channels]
        further[here, channels] = 0
        changes = slope + caution * further
        values[name] = (changes - changes.min(axis=0)).astype(np.float32)
    return replace(measured, values=values, widths=widths, method="change at a plan")


def _widths(plan: BitPlan) -> tuple[int, ...]:
    """Widths that a channel may get: all the quantizer and the target have."""
    return tuple(sorted({0, 16, *plan.quantizer.rules} & {0, *plan.containers}))


def _at(measured: Sensitivities, name: str, bits: int) -> NDArray[np.float64]:
    return measured.at(name, bits).astype(np.float64)


def _recorded(
    plan: BitPlan, measured: Sensitivities, start: str, rounds: Sequence[Round]
) -> BitPlan:
    """Return a plan that says what it was made of, and its additive error."""
    error = sum(
        float(_at(measured, name, bits)[widths == bits].sum())
        for name, widths in plan.widths.items()
        for bits in np.unique(widths).tolist()
    )
    refinement = {"start": start, "rounds": [asdict(each) for each in rounds]}
    return replace(
        plan,
        sensitivities_digest=measured.digest,
        expected_error=error,
        allocation={**(plan.allocation or {}), _KEY: refinement},
    )


def _changed(plan: BitPlan, other: BitPlan) -> int:
    return sum(int((widths != other.widths[name]).sum()) for name, widths in plan.widths.items())


def _resumed(journal: Path | None, start: str) -> tuple[BitPlan, list[Round]] | None:
    """Return the plan and rounds of a journal that began with the same plan."""
    if journal is None or not journal.is_file():
        return None
    try:
        plan = BitPlan.load(journal)
        saved = (plan.allocation or {})[_KEY]
        if saved["start"] == start:
            return plan, [Round(**each) for each in saved["rounds"]]
    except (ArtifactError, KeyError, TypeError) as error:
        _log.warning("starting anew: %s", error)
    return None

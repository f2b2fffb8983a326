"""Plan again on the quantized policy, and keep what its measured action error says is better.

A plan's additive error takes channels to disturb the action independently, and on other
observations as on those it was measured on; neither is so. Each round makes plans that could be
better, with their own codes, and measures their action error on observations that were not used
for them. Which plans those are depends on the quantizer:

- Nearest codes: widths move along the slopes of the action error at the plan, more and less far;
  see `qvla_export.error_slopes`.
- Codes that make up for each other: what the sensitivities leave out is how well that works on
  other observations, which depends on the width; a width is charged more or less than its
  sensitivities; see `qvla_export.charges`. Codes are tried that are made from moments of other
  observations than they are tried on: on their own the error is half of what it is elsewhere.

Everything is in memory at once: float weights, weights in place and, for slopes, their gradients.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qvla_export.charges import charged, neighbours
from qvla_export.error_slopes import changes_at, error_slopes
from qvla_export.errors import ArtifactError, QvlaError
from qvla_export.layers import fake_quantized
from qvla_export.moments import Moments
from qvla_export.observation import Observation
from qvla_export.plan import BitPlan
from qvla_export.policies.base import Policy
from qvla_export.rounded_plan import round_plan
from qvla_export.sensitivity import Sensitivities

# The first round's caution, and by what further ones try more and less.
_CAUTION = 100.0
_STEP = 3.0
# Observations that run together.
_BATCH_SIZE = 8
_SMALLEST = 1e-30
# To this share the typical ||dA|| must fall: any other widths, no better ones, move it by as much.
_WORTH = 0.95
# What a plan's record calls its refinement.
_KEY = "refinement"
_log = logging.getLogger(__name__)

Steps = list[tuple[dict[str, float], Sensitivities]]


@dataclass(frozen=True)
class Trial:
    """Observations that a plan is tried on."""

    observations: Sequence[Observation]
    # Of others, where the quantizer makes its codes from them.
    moments: Moments | None = None


@dataclass(frozen=True)
class Evidence:
    """What a refinement goes by.

    Raises:
        QvlaError: no observations.
    """

    # What slopes are taken on; not needed where the quantizer makes codes from moments.
    fitted: Sequence[Observation]
    # A plan is better if its action error is less in each of them.
    trials: Sequence[Trial]

    def __post_init__(self) -> None:
        counts = [len(self.fitted), *(len(each.observations) for each in self.trials)]
        if len(counts) < 2 or not min(counts):
            raise QvlaError(
                "refining needs observations to plan on and others to decide by, got "
                f"{counts}; draw more: qvla calibrate --count"
            )


@dataclass(frozen=True)
class Round:
    """One round: the best of what was tried, and whether its plan was taken."""

    # What the plan was made with.
    step: Mapping[str, float]
    # Channels whose width it changes.
    changed: int
    # Geometric mean of the observations' ||dA||^2 in each trial, before and with the best plan of
    # the round. Of their mean a few observations would make most, and those decide by chance.
    errors_before: Sequence[float]
    errors_after: Sequence[float]

    @property
    def accepted(self) -> bool:
        """Whether the error fell in each trial, and over all by more than is worth nothing."""
        ratios = np.divide(self.errors_after, self.errors_before)
        return bool((ratios < 1).all() and np.log(ratios).mean() <= 2 * np.log(_WORTH))


def refine_plan(
    policy: Policy,
    evidence: Evidence,
    measured: Sensitivities,
    plan: BitPlan,
    allocate: Callable[[Sensitivities], BitPlan],
    rounds: int,
    journal: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BitPlan:
    """Return a plan of no more measured action error, its rounds in `allocation`, without codes.

    Args:
        policy: float32; its weights are as before afterwards.
        evidence: what to go by.
        measured: the sensitivities.
        plan: what to begin with.
        allocate: from a table in the place of `measured`; keeps whatever limits there are.
        rounds: at most so many; fewer once two in turn found nothing.
        journal: the plan so far is saved here after each round; a killed run that finds it goes on.
        on_progress: called with (rounds done, rounds in all).

    Raises:
        QvlaError: no round, or the quantizer makes codes from moments and there are none.
    """
    if rounds < 1:
        raise QvlaError(f"refining needs at least one round, got {rounds}")
    if plan.quantizer.needs_moments and any(each.moments is None for each in evidence.trials):
        raise QvlaError(
            "the plan's codes are made from what the layers are fed, and refining makes them: "
            "measure that first, qvla moments"
        )
    start = plan
    bench = _Bench(policy, evidence)
    plan, done = _resumed(journal, start, rounds) or (plan, [])
    errors = bench.errors(plan)
    for number in range(len(done), rounds):
        if [r.accepted for r in done[-2:]] == [False, False]:
            break
        found: list[tuple[Round, BitPlan]] = []
        for step, table in bench.steps(measured, plan, done):
            other = allocate(table)
            found.append((Round(step, _changed(plan, other), errors, bench.errors(other)), other))
        # First what would be taken, then what is least.
        best, other = min(found, key=lambda each: (not each[0].accepted, sum(each[0].errors_after)))
        done.append(best)
        _log.debug("round %d: %s", number + 1, best)
        if best.accepted:
            plan, errors = other, best.errors_after
        plan = _recorded(plan, measured, start.digest, rounds, done)
        if journal is not None:
            plan.save(journal)
        if on_progress is not None:
            on_progress(number + 1, rounds)
    return plan


def is_refined(plan: BitPlan, start: BitPlan, rounds: int) -> bool:
    """Say whether a plan is what rounds, of so many, made of another."""
    refinement = (plan.allocation or {}).get(_KEY, {})
    return (refinement.get("start"), refinement.get("asked")) == (start.digest, rounds)


def rounds_in(plan: BitPlan) -> list[Round]:
    """Return the rounds that a plan was refined in; none where it was not."""
    refinement = (plan.allocation or {}).get(_KEY, {})
    return [Round(**each) for each in refinement.get("rounds", ())]


@dataclass(frozen=True)
class _Bench:
    """Where plans are tried."""

    policy: Policy
    evidence: Evidence
    _references: dict[int, list[Tensor]] = field(default_factory=dict)
    _known: dict[bytes, list[float]] = field(default_factory=dict)

    def errors(self, plan: BitPlan) -> Sequence[float]:
        """Return the geometric mean of ||dA||^2 in each trial, weights fake-quantized."""
        widths = b"".join(w.tobytes() for w in plan.widths.values())
        if widths not in self._known:
            self._known[widths] = [self._error(plan, each) for each in self.evidence.trials]
        return self._known[widths]

    def steps(self, measured: Sensitivities, plan: BitPlan, done: Sequence[Round]) -> Steps:
        """Return what a round tries: what each is made with, and the table to allocate from."""
        if plan.quantizer.needs_moments:
            taken = [dict(each.step) for each in done if each.accepted]
            tried = neighbours(taken[-1] if taken else {}, len(done))
            return [(step, charged(measured, step)) for step in tried]
        slopes = error_slopes(self.policy, *self._batches(self.evidence.fitted), plan)
        caution = done[-1].step["caution"] if done else _CAUTION
        if done and not done[-1].accepted:
            caution *= _STEP**2  # after a round that found nothing, smaller steps
        tried = [{"caution": caution * factor} for factor in (1 / _STEP, 1, _STEP)]
        return [(step, changes_at(measured, plan, slopes, step["caution"])) for step in tried]

    def _error(self, plan: BitPlan, trial: Trial) -> float:
        if plan.quantizer.needs_moments:
            assert trial.moments is not None
            plan = round_plan(self.policy, plan, trial.moments)
        batches, reference = self._batches(trial.observations)
        found = []
        with torch.no_grad(), fake_quantized(self.policy, plan):
            for batch, expected in zip(batches, reference, strict=True):
                moved = self.policy.normalized_actions(self.policy.batch(batch)) - expected
                found.append(moved.double().square().flatten(1).sum(dim=1))
        return float(torch.cat(found).clamp(min=_SMALLEST).log().mean().exp())

    def _batches(
        self, observations: Sequence[Observation]
    ) -> tuple[list[Sequence[Observation]], list[Tensor]]:
        """Return batches, and the float policy's normalized actions of each."""
        size = _BATCH_SIZE
        batches = [observations[i : i + size] for i in range(0, len(observations), size)]
        if id(observations) not in self._references:
            with torch.no_grad():
                reference = [self.policy.normalized_actions(self.policy.batch(b)) for b in batches]
            self._references[id(observations)] = reference
        return batches, self._references[id(observations)]


def _recorded(
    plan: BitPlan, measured: Sensitivities, start: str, asked: int, rounds: Sequence[Round]
) -> BitPlan:
    """Return a plan that says what it was made of, and its additive error."""
    error = sum(
        float(measured.at(name, bits).astype(np.float64)[widths == bits].sum())
        for name, widths in plan.widths.items()
        for bits in np.unique(widths).tolist()
    )
    refinement = {"start": start, "asked": asked, "rounds": [asdict(each) for each in rounds]}
    return replace(
        plan,
        sensitivities_digest=measured.digest,
        expected_error=error,
        allocation={**(plan.allocation or {}), _KEY: refinement},
    )


def _changed(plan: BitPlan, other: BitPlan) -> int:
    return sum(int((widths != other.widths[name]).sum()) for name, widths in plan.widths.items())


def _resumed(
    journal: Path | None, start: BitPlan, rounds: int
) -> tuple[BitPlan, list[Round]] | None:
    """Return the plan and rounds of a journal that began with the same plan."""
    if journal is None or not journal.is_file():
        return None
    try:
        plan = BitPlan.load(journal)
        if is_refined(plan, start, rounds):
            return plan, rounds_in(plan)
    except (ArtifactError, KeyError, TypeError) as error:
        _log.warning("starting anew: %s", error)
    return None

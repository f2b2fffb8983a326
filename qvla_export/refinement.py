"""Plan again on the quantized policy, and keep what its measured action error says is better.

A plan's additive error takes channels to disturb the action independently and alike on other
observations than those it was measured on; neither is so. Each round makes plans that could be
better, with their own codes, and measures their action error on observations that are held aside.
Which plans those are depends on the quantizer:

- Nearest codes: widths move along the slopes of the action error at the plan, more and less far;
  see `qvla_export.error_slopes`.
- Codes that make up for each other: what the sensitivities leave out is how well that works on
  other observations, which depends on the width; widths are charged more and less than their
  sensitivities; see `qvla_export.charges`. Codes are made from moments without the observations
  held aside, or the errors there would be too small.

Everything is in memory at once: float weights, weights in place and, for slopes, their gradients.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
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
# What a plan's record calls its refinement.
_KEY = "refinement"
_log = logging.getLogger(__name__)

Steps = list[tuple[dict[str, float], Sensitivities]]


@dataclass(frozen=True)
class Evidence:
    """What a refinement goes by.

    Raises:
        QvlaError: no observations.
    """

    # What slopes are taken on.
    fitted: Sequence[Observation]
    # Others, of other episodes: the action error on them says which plan is better.
    deciding: Sequence[Observation]
    # Of `fitted`, where the quantizer makes its codes from them.
    moments: Moments | None = None

    def __post_init__(self) -> None:
        if not self.fitted or not self.deciding:
            raise QvlaError(
                "refining needs observations to plan on and others to decide by, got "
                f"{len(self.fitted)} and {len(self.deciding)}; draw more: qvla calibrate --count"
            )


@dataclass(frozen=True)
class Round:
    """One round: the best of what was tried, and whether its plan was taken."""

    # What the plan was made with.
    step: Mapping[str, float]
    # Channels whose width it changes.
    changed: int
    # E||dA||^2 on the deciding observations, before and with the round's best plan.
    error_before: float
    error_after: float
    # Of their difference: what it varies by from one draw of observations to the next.
    standard_error: float

    @property
    def accepted(self) -> bool:
        """Whether the error fell, by more than chance would have it."""
        return self.error_after + self.standard_error < self.error_before


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
    if plan.quantizer.needs_moments and evidence.moments is None:
        raise QvlaError(
            "the plan's codes are made from what the layers are fed, and refining makes them: "
            "measure that first, qvla moments"
        )
    start = plan.digest
    bench = _Bench(policy, evidence)
    plan, done = _resumed(journal, start) or (plan, [])
    errors = bench.errors(plan)
    for number in range(len(done), rounds):
        if [r.accepted for r in done[-2:]] == [False, False]:
            break
        found: list[tuple[Round, NDArray[np.float64], BitPlan]] = []
        for step, table in bench.steps(measured, plan, done):
            other = allocate(table)
            after = bench.errors(other)
            found.append((_judged(step, _changed(plan, other), errors, after), after, other))
        best, after, other = min(found, key=lambda each: each[0].error_after)
        done.append(best)
        _log.debug("round %d: %s", number + 1, best)
        if best.accepted:
            plan, errors = other, after
        plan = _recorded(plan, measured, start, rounds, done)
        if journal is not None:
            plan.save(journal)
        if on_progress is not None:
            on_progress(number + 1, rounds)
    return plan


def is_refined(plan: BitPlan, start: BitPlan, rounds: int) -> bool:
    """Say whether a plan is what so many rounds made of another."""
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
    _known: dict[bytes, NDArray[np.float64]] = field(default_factory=dict)

    def errors(self, plan: BitPlan) -> NDArray[np.float64]:
        """Return ||dA||^2 of a plan on each deciding observation, weights fake-quantized."""
        widths = b"".join(w.tobytes() for w in plan.widths.values())
        if widths not in self._known:
            self._known[widths] = self._measured(plan)
        return self._known[widths]

    def steps(self, measured: Sensitivities, plan: BitPlan, done: Sequence[Round]) -> Steps:
        """Return what a round tries: what each is made with, and the table to allocate from."""
        if plan.quantizer.needs_moments:
            taken = [dict(each.step) for each in done if each.accepted]
            vain = sum(not each.accepted for each in done)
            tried = neighbours(taken[-1] if taken else {}, _STEP ** (0.5**vain))
            return [(step, charged(measured, step)) for step in tried]
        slopes = error_slopes(self.policy, *self._batches(self.evidence.fitted), plan)
        caution = done[-1].step["caution"] if done else _CAUTION
        if done and not done[-1].accepted:
            caution *= _STEP**2  # after a round that found nothing, smaller steps
        tried = [{"caution": caution * factor} for factor in (1 / _STEP, 1, _STEP)]
        return [(step, changes_at(measured, plan, slopes, step["caution"])) for step in tried]

    def _measured(self, plan: BitPlan) -> NDArray[np.float64]:
        batches, reference = self._batches(self.evidence.deciding)
        found = []
        with torch.no_grad(), fake_quantized(self.policy, self._with_codes(plan)):
            for batch, expected in zip(batches, reference, strict=True):
                moved = self.policy.normalized_actions(self.policy.batch(batch)) - expected
                found.append(moved.double().square().flatten(1).sum(dim=1).cpu().numpy())
        return np.concatenate(found)

    def _with_codes(self, plan: BitPlan) -> BitPlan:
        if not plan.quantizer.needs_moments:
            return plan
        assert self.evidence.moments is not None
        return round_plan(self.policy, plan, self.evidence.moments)

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


def _judged(
    step: dict[str, float],
    changed: int,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
) -> Round:
    """Compare a plan's errors with those before, observation by observation."""
    spread = float(np.std(after - before, ddof=1)) if len(before) > 1 else 0.0
    deviation = spread / len(before) ** 0.5
    return Round(step, changed, float(before.mean()), float(after.mean()), deviation)


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


def _resumed(journal: Path | None, start: str) -> tuple[BitPlan, list[Round]] | None:
    """Return the plan and rounds of a journal that began with the same plan."""
    if journal is None or not journal.is_file():
        return None
    try:
        plan = BitPlan.load(journal)
        if (plan.allocation or {})[_KEY]["start"] == start:
            return plan, rounds_in(plan)
    except (ArtifactError, KeyError, TypeError) as error:
        _log.warning("starting anew: %s", error)
    return None

"""Codes and scales tuned together: they answer what all layers do to the action at once.

Codes are made layer by layer, each for its own error. What they do together is not linear, and is
the quantized policy's action less the float policy's: both are run on the same observations, and
the codes and the logarithms of the scales go down the gradient of the difference. Between its
codes a weight has a number that moves as the weight would (Bengio et al. 2013, straight through);
its code is the nearest whole one. An eighth of the observations is left out and judges: of the
codes at the start, after each quarter and at the end the ones that miss its actions least are
taken, so that nothing changes where nothing helps. Widths and bytes stay as they are.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from qvla_export.measurement.tuned_layers import TunedLayer, tuned_layers
from qvla_export.policies.base import Policy, PolicyBatch
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.round_plan import require_rounded
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

# One of so many observations judges.
_FOLDS = 8
# How often the codes are judged on the way.
_JUDGEMENTS = 4
_WARMUP_STEPS = 20
# Steps whose median gradient bounds the next one's.
_REMEMBERED_NORMS = 200
# Of a squared error, below which an observation has none to speak of.
_NO_ERROR = 1e-8
# Of the root of the tokens' divergence, beside the error that it stands next to.
_DIVERGENCE_SHARE = 0.1


@dataclass(frozen=True)
class TuningSettings:
    """How codes and scales go down the gradient."""

    # Times that each observation is seen, in so many steps at most.
    passes: int = 40
    most_steps: int = 1000
    # Observations of a step.
    batch_size: int = 16
    # Of Adam: of a scale's logarithm, and of a code, which is one wide.
    scale_rate: float = 3e-4
    code_rate: float = 1e-2
    seed: int = 0

    def steps(self, observations: int) -> int:
        """Return how many steps so many observations are tuned on; some of them only judge."""
        batches = -(-(observations - _left_out(observations)) // self.batch_size)
        return min(self.passes * batches, self.most_steps)


DEFAULT_TUNING = TuningSettings()


def tune_codes(
    policy: Policy,
    plan: BitPlan,
    observations: Sequence[Observation],
    settings: TuningSettings = DEFAULT_TUNING,
    tell: Callable[[int, int], None] | None = None,
) -> BitPlan:
    """Return a plan with codes and scales of less action error.

    Activations count as float. An observation counts by the root of its squared error: the few
    that stand between two actions would else be all that counts.

    Args:
        policy: the full-precision policy, whole in memory; stays as it is.
        plan: with its codes.
        observations: those that the codes were made from, those of an episode in a row.
        settings: steps, rates, batch and seed.
        tell: called with (steps done, steps in all).

    Raises:
        QvlaError: fewer than two observations.
        PlanMismatch: the plan has no codes.
    """
    require_rounded(plan)
    if len(observations) < 2:
        raise QvlaError(
            f"codes are tuned on 2 observations at least, got {len(observations)}: qvla calibrate"
        )
    left_out, steps = _left_out(len(observations)), settings.steps(len(observations))
    taught = _Taught.by(policy, observations[:-left_out], settings)
    judging = _Taught.by(policy, observations[-left_out:], settings)
    with tuned_layers(policy, plan) as tuned:
        best, least = plan, judging.error(policy)
        for step in _descent(policy, tuned, taught, steps, settings):
            if tell is not None:
                tell(step, steps)
            if step % -(-steps // _JUDGEMENTS) == 0 or step == steps:
                error = judging.error(policy)
                if error < least:
                    best, least = _with_codes(plan, tuned), error
    return best


def _left_out(observations: int) -> int:
    return max(1, observations // _FOLDS)


def _root(values: Tensor) -> Tensor:
    """Return the root of each observation's mean.  [B, ...] -> [B]"""
    return (values.flatten(1).mean(dim=1).clamp(min=0) + _NO_ERROR).sqrt()


@dataclass(frozen=True)
class _Taught:
    """Observations, a batch at a time, and what the float policy does in them."""

    batches: tuple[PolicyBatch, ...]
    # Normalized.  [B, horizon, dim] each
    actions: tuple[Tensor, ...]
    # Of the tokens that stand for actions; None where none do.  [B, tokens, choices] each
    logits: tuple[Tensor | None, ...]

    @staticmethod
    def by(
        policy: Policy, observations: Sequence[Observation], settings: TuningSettings
    ) -> "_Taught":
        """Run the float policy in observations."""
        size = settings.batch_size
        order = np.random.default_rng(settings.seed).permutation(len(observations)).tolist()
        some = [order[start : start + size] for start in range(0, len(order), size)]
        batches = tuple(policy.batch([observations[one] for one in each]) for each in some)
        with torch.no_grad():
            return _Taught(
                batches,
                tuple(policy.normalized_actions(batch) for batch in batches),
                tuple(policy.token_logits(batch) for batch in batches),
            )

    def errors(self, policy: Policy, number: int) -> Tensor:
        """Return the error of the policy as it is, in each observation of a batch.  [B]

        The RMS error; where tokens stand for the action also a share of the root of their
        divergence, which says how near another token is.
        """
        difference = policy.normalized_actions(self.batches[number]) - self.actions[number]
        errors = _root(difference.square())
        logits = policy.token_logits(self.batches[number])
        before = self.logits[number]
        if logits is None or before is None:
            return errors
        old, new = before.log_softmax(dim=-1), logits.log_softmax(dim=-1)
        return errors + _DIVERGENCE_SHARE * _root((old.exp() * (old - new)).sum(dim=-1))

    def error(self, policy: Policy) -> float:
        """Return the mean of the errors in all observations."""
        with torch.no_grad():
            errors = [self.errors(policy, number) for number in range(len(self.batches))]
        return float(torch.cat(errors).mean())


def _descent(
    policy: Policy,
    tuned: Mapping[str, TunedLayer],
    taught: _Taught,
    steps: int,
    settings: TuningSettings,
) -> Iterator[int]:
    """Yield the number of each step, from 1, once it is taken."""
    blocks = [block for layer in tuned.values() for block in layer.blocks]
    codes, logarithms = [b.codes for b in blocks], [b.logarithms for b in blocks]
    optimizer = torch.optim.Adam(
        [
            {"params": codes, "lr": settings.code_rate},
            {"params": logarithms, "lr": settings.scale_rate},
        ],
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda done: min(1, (done + 1) / _WARMUP_STEPS) * max(0.0, 1 - done / steps),
    )
    generator, norms = np.random.default_rng(settings.seed), list[float]()
    for step in range(1, steps + 1):
        number = int(generator.integers(len(taught.batches)))
        torch.autograd.backward(taught.errors(policy, number).mean())
        for layer in tuned.values():
            layer.take_gradient()
        # A batch near the edge of two actions has a gradient many times the others'.
        bound = statistics.median(norms[-_REMEMBERED_NORMS:]) if norms else float("inf")
        norms.append(float(nn.utils.clip_grad_norm_([*codes, *logarithms], bound)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for block in blocks:
            block.stay_within()
        for layer in tuned.values():
            layer.follow()
        yield step


def _with_codes(plan: BitPlan, tuned: Mapping[str, TunedLayer]) -> BitPlan:
    """Return the plan with the codes and scales that its layers have now."""
    assert plan.rounding is not None
    layers = {
        name: tuned[name].rounded(old, plan.widths[name], plan.quantizer)
        for name, old in plan.rounding.layers.items()
    }
    return replace(plan, rounding=replace(plan.rounding, layers=layers))

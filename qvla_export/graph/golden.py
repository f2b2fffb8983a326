"""What torch computes for held-out observations: the actions that every engine is held against."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.policies.base import Policy, PolicyBatch, PolicyPart
from qvla_export.policies.layers import (
    fake_quantized,
    planned_rows,
    rounded_inputs,
    traced_layers,
)
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import as_rows
from qvla_export.quantizer.scale_search import Steps
from qvla_export.shared.bundle import Golden
from qvla_export.shared.observation import Observation
from qvla_export.shared.program import PartRuns, Program, run_program

_Feeds = Mapping[str, NDArray[Any]]
# One tensor for each observation.
_Values = list[Tensor]


def golden_actions(
    policy: Policy, plan: BitPlan | None, observations: Sequence[Observation]
) -> Golden:
    """Return model inputs of observations with torch's actions, quantized and full precision."""
    full_precision = _actions(policy, observations)
    reference = full_precision
    if plan is not None:
        with fake_quantized(policy, plan):
            reference = _actions(policy, observations)
    return Golden(_feeds(policy, observations), reference, full_precision)


@dataclass(frozen=True)
class TokenDivergence:
    """How far a changed policy is from what it was, given the tokens that it chose before."""

    # Of the distributions of all tokens of an action or chunk, in nats; mean over observations.
    kl: float
    # Root mean square difference of the actions that sensitivities are errors of, normalized: the
    # expected bin centres, or what is decoded of the tokens.
    expected_rms: float


@torch.no_grad()
def token_divergence(
    policy: Policy,
    observations: Sequence[Observation],
    changed: Callable[[], AbstractContextManager[None]],
) -> TokenDivergence | None:
    """Return the divergence of a policy's distributions over tokens once it is changed (eq. 2).

    D_KL of what the policy as it is gives each token from what the changed one gives it, both given
    the tokens that the former chooses: summed over the tokens of an action or chunk, which by the
    chain rule is the divergence of the whole along these tokens, and averaged over observations.
    Executed actions jump where two tokens are about as likely and a small change turns them round;
    neither figure does.

    Args:
        policy: as it is; in memory.
        observations: at least one.
        changed: opens the block in which the policy acts otherwise.

    Returns:
        None where no tokens stand for the action.
    """
    batches = [policy.batch([item]) for item in observations]
    before = [_expected(policy, batch) for batch in batches]
    with changed():
        after = [_expected(policy, batch) for batch in batches]
    both = [
        (*old, *new)
        for old, new in zip(before, after, strict=True)
        if old is not None and new is not None
    ]
    if not both:
        return None
    kls = [float((old.exp() * (old - new)).sum()) for old, _, new, _ in both]
    squares = [float((old - new).square().mean()) for _, old, _, new in both]
    return TokenDivergence(float(np.mean(kls)), float(np.sqrt(np.mean(squares))))


def _expected(policy: Policy, batch: PolicyBatch) -> tuple[Tensor, Tensor] | None:
    """Return logarithms of what the tokens get, and the actions expected of that."""
    logits = policy.token_logits(batch)
    if logits is None:
        return None
    return logits.double().log_softmax(dim=-1), policy.normalized_actions(batch).double()


@dataclass(frozen=True)
class CutPolicy:
    """A policy and the parts that it runs in; its weights may have been left on disk."""

    policy: Policy
    parts: Sequence[PolicyPart]
    program: Program
    # Part name -> parameters and buffers of the policy that it reads.
    reads: Mapping[str, Sequence[str]]

    @property
    def repeats(self) -> bool:
        """Whether a part is called more than once for one action."""
        return max(self.program.calls.values()) > 1


def golden_calls(program: Program, plan: BitPlan | None) -> int:
    """Return how many calls of parts `golden_actions_in_parts` takes."""
    return sum(program.calls.values()) * (1 if plan is None else 2)


def golden_actions_in_parts(
    cut: CutPolicy,
    plan: BitPlan | None,
    observations: Sequence[Observation],
    on_call: Callable[[], None] = lambda: None,
) -> Golden:
    """Return the same as `golden_actions`, holding one part's weights at a time.

    Args:
        cut: the policy and its parts.
        plan: None for the float policy.
        observations: the held-out ones.
        on_call: called after every call of a part, `golden_calls` times.
    """
    feeds = _feeds(cut.policy, observations)
    full_precision = _actions_in_parts(cut, None, feeds, on_call)
    reference = full_precision
    if plan is not None:
        reference = _actions_in_parts(cut, plan, feeds, on_call)
    return Golden(feeds, reference, full_precision)


@torch.no_grad()
def _actions_in_parts(
    cut: CutPolicy,
    plan: BitPlan | None,
    feeds: Sequence[_Feeds],
    on_call: Callable[[], None],
) -> NDArray[np.float32]:
    """Run the program on all observations side by side: a part's weights are read once a call.

    A part that repeats by itself keeps them; of others that repeat the plan's scales are kept, as
    their search takes many times what rounding does.
    """
    parts = {part.name: part for part in cut.parts}
    held: dict[str, dict[str, Tensor]] = {}
    kept: dict[str, dict[int, Steps]] | None = {} if cut.repeats else None

    def call(run: PartRuns, name: str, inputs: dict[str, _Values]) -> dict[str, _Values]:
        if name not in held:
            held.clear()
            held[name] = _parameters(cut.policy, cut.reads[name], plan, kept)
        part = parts[name]
        found = []
        for values in zip(*(inputs[source] for source in part.inputs), strict=True):
            output = torch.func.functional_call(part.module, held[name], values)
            found.append(output if isinstance(output, tuple) else (output,))
        on_call()
        by_output = zip(*found, strict=True)
        return {name: list(values) for name, values in zip(part.outputs, by_output, strict=True)}

    start = {name: [torch.from_numpy(item[name]) for item in feeds] for name in feeds[0]}
    reads = {part.name: list(part.inputs) for part in cut.parts}
    activations = None if plan is None else plan.activations
    couplings = {} if plan is None else plan.couplings
    removed = {name: coupling.constant_units for name, coupling in couplings.items()}
    with rounded_inputs(traced_layers(cut.policy), activations, removed):
        values = run_program(cut.program, reads, start, call)
    return np.concatenate([actions.numpy() for actions in values["actions"]])


def _parameters(
    policy: Policy,
    names: Sequence[str],
    plan: BitPlan | None,
    kept: dict[str, dict[int, Steps]] | None,
) -> dict[str, Tensor]:
    """Weights by their names in a part's module, as the plan's engine computes with them."""
    parameters = {}
    for name in names:
        values = policy.read_weight(name)
        layer = name.removesuffix(".weight")
        if plan is not None and layer in plan.widths:
            steps = None if kept is None else kept.setdefault(layer, {})
            rows = planned_rows(layer, as_rows(values), plan, steps)
            values = rows.reshape(values.shape)
        parameters[f"module.{name}"] = torch.from_numpy(np.ascontiguousarray(values))
    return parameters


@torch.no_grad()
def _actions(policy: Policy, observations: Sequence[Observation]) -> NDArray[np.float32]:
    """Normalized actions one observation at a time, as the engine computes them."""
    chunks = [policy.greedy_actions(policy.batch([item])).numpy() for item in observations]
    return np.concatenate(chunks)


def _feeds(policy: Policy, observations: Sequence[Observation]) -> tuple[_Feeds, ...]:
    return tuple(policy.processor.feeds(observation) for observation in observations)

"""Sensitivities and a budget -> a bit plan: Algorithm 1 of the paper. numpy only.

The heap of Algorithm 1 always holds one step a channel, so it yields the steps by the largest rho
met so far along their channel's chain 16 -> 8 -> 4 -> 2 -> 0: a cheap step behind a dear one leaves
the heap directly after it. One stable sort of all steps therefore gives the heap's order, ties by
channel; `tests/test_plan.py` holds it against the printed pseudo-code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qvla_export.errors import QvlaError
from qvla_export.plan import BitPlan
from qvla_export.sensitivity import Sensitivities
from qvla_export.target import WIDTHS, Target

BudgetKind = Literal["bits per channel", "bits per weight", "bytes"]


@dataclass(frozen=True)
class Budget:
    """How much a plan may cost.

    Budget("bits per channel", 4.0)                          # the paper's average
    Budget("bits per channel", 4.0, max_stored_ratio=0.29)   # and at most 29 % of float16's bytes
    Budget("bytes", 3_000_000)                               # stored on the target, with scales
    """

    kind: BudgetKind
    # Mean bits, or bytes.
    value: float
    # Largest stored share of the float16 bytes, scales included; None for no such limit.
    max_stored_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(BudgetKind):
            raise QvlaError(f"a budget is one of {get_args(BudgetKind)}, got {self.kind!r}")
        if not np.isfinite(self.value) or self.value < 0:
            raise QvlaError(f"a budget must be a number >= 0, got {self.value}")
        if self.max_stored_ratio is not None and not self.max_stored_ratio >= 0:
            raise QvlaError(f"max_stored_ratio must be >= 0, got {self.max_stored_ratio}")

    def __str__(self) -> str:
        text = f"{self.value:g} {'bytes' if self.kind == 'bytes' else f'mean {self.kind}'}"
        if self.max_stored_ratio is None:
            return text
        return f"{text}, stored at most {self.max_stored_ratio:g} of float16"


@dataclass(frozen=True)
class PruningRule:
    """Limits on the step 2 -> 0 (section 3.3.2: dual-threshold and L0-style constraints)."""

    # Largest share of a layer's channels that may be pruned.
    max_share_of_layer: float = 1.0
    # Largest share of all channels that may be pruned: the L0-style constraint.
    max_share: float = 1.0
    # Channels with a larger sensitivity at 0 bits are kept; None for no threshold.
    absolute_threshold: float | None = None
    # The same, as a multiple of the layer's mean sensitivity at 0 bits.
    relative_threshold: float | None = None


@dataclass(frozen=True)
class _Steps:
    """All adjacent demotions; columns are the channels of all layers side by side."""

    # Widths from high to low; step i goes from widths[i] to widths[i + 1].
    widths: tuple[int, ...]
    # Increase in error of each step.  float64 [steps, channels]
    added: NDArray[np.float64]
    # Bits of a whole channel at each width: nominal per channel, per weight, and stored.
    # int64 [steps + 1, channels]
    nominal: NDArray[np.int64]
    weighted: NDArray[np.int64]
    stored: NDArray[np.int64]
    # Whether the pruning thresholds allow the step.  bool [steps, channels]
    allowed: NDArray[np.bool_]
    # Layer of each channel.  int64 [channels]
    layer: NDArray[np.int64]
    # Bits of all weights in float16.
    float16_bits: int


def allocate_bits(
    sensitivities: Sensitivities,
    budget: Budget,
    target: Target,
    widths: Sequence[int] = WIDTHS,
    pruning: PruningRule | None = None,
) -> BitPlan:
    """Demote the channel that adds least error per saved bit until the budget is met (Algorithm 1).

    What a step saves (eq. 8) is counted in the budget's own unit. A limit on the stored ratio that
    the budget leaves unmet is then met by further steps, ordered by error per stored bit.

    Args:
        sensitivities: of the policy.
        budget: the limits.
        target: what the bytes are counted on; widths it has no container for are not used.
        widths: allowed widths; 16 must be among them, every channel starts there.
        pruning: limits on the step to 0 bits; None for none.

    Raises:
        QvlaError: the budget cannot be met, an unknown width.
    """
    allowed = _allowed_widths(widths, sensitivities, budget, target)
    pruning = pruning or PruningRule()
    steps = _steps(sensitivities, target, allowed, pruning)
    taken = np.zeros(steps.added.shape, dtype=bool)
    cost = {
        "bits per channel": steps.nominal,
        "bits per weight": steps.weighted,
        "bytes": steps.stored,
    }[budget.kind]
    limit = _budget_bits(budget, steps)
    taken = _demote(steps, taken, cost, limit, pruning, f"the budget of {budget}")
    if budget.max_stored_ratio is not None:
        cap = budget.max_stored_ratio * steps.float16_bits
        taken = _demote(steps, taken, steps.stored, cap, pruning, f"the limit in {budget}")
    return _plan(sensitivities, budget, target, steps, taken)


def _allowed_widths(
    widths: Sequence[int], sensitivities: Sensitivities, budget: Budget, target: Target
) -> tuple[int, ...]:
    """Allowed widths from high to low that the target has and that were measured."""
    if 16 not in widths or not set(widths) <= set(WIDTHS):
        raise QvlaError(f"allowed widths must be among {WIDTHS} and contain 16, got {list(widths)}")
    available = [b for b in sorted(set(widths), reverse=True) if b == 0 or b in target.containers]
    for bits in available:
        if bits != 16 and bits not in sensitivities.widths:
            raise QvlaError(
                f"no sensitivities at {bits} bits, only at {sensitivities.widths}; "
                "measure them or leave the width out"
            )
    if budget.kind != "bytes" and budget.max_stored_ratio is None:
        return tuple(available)
    # Where bytes count, a width stored like a wider one (2 bits on TensorRT) only adds error.
    kept = [available[0]]
    for bits in available[1:]:
        if bits == 0 or target.containers[bits].bits < target.containers[kept[-1]].bits:
            kept.append(bits)
    return tuple(kept)


def _steps(
    sensitivities: Sensitivities, target: Target, widths: tuple[int, ...], pruning: PruningRule
) -> _Steps:
    names = list(sensitivities.values)
    sizes = [sensitivities.values[name].shape[1] for name in names]
    layer = np.repeat(np.arange(len(names)), sizes)
    inputs = np.array([sensitivities.weights_per_channel[name] for name in names], np.int64)
    errors = np.stack(
        [np.concatenate([sensitivities.at(name, bits) for name in names]) for bits in widths]
    ).astype(np.float64)
    row_bits = np.array(
        [
            [target.containers[bits].row_bits(int(n)) if bits else 0 for n in inputs]
            for bits in widths
        ],
        np.int64,
    )
    nominal = np.repeat(np.array(widths, np.int64)[:, None], len(layer), axis=1)
    allowed = np.ones((len(widths) - 1, len(layer)), dtype=bool)
    if widths[-1] == 0 and len(widths) > 1:
        allowed[-1] = _may_be_pruned(errors[-1], layer, sizes, pruning)
    return _Steps(
        widths=widths,
        added=np.diff(errors, axis=0),
        nominal=nominal,
        weighted=nominal * inputs[layer],
        stored=row_bits[:, layer],
        allowed=allowed,
        layer=layer,
        float16_bits=int(16 * inputs[layer].sum()),
    )


def _may_be_pruned(
    errors: NDArray[np.float64], layer: NDArray[np.int64], sizes: list[int], rule: PruningRule
) -> NDArray[np.bool_]:
    """Apply both thresholds to the sensitivities at 0 bits.  bool [channels]"""
    allowed = np.ones(len(errors), dtype=bool)
    if rule.absolute_threshold is not None:
        allowed &= errors <= rule.absolute_threshold
    if rule.relative_threshold is not None:
        means = np.bincount(layer, errors) / np.array(sizes)
        allowed &= errors <= rule.relative_threshold * means[layer]
    return allowed


def _budget_bits(budget: Budget, steps: _Steps) -> float:
    if budget.kind == "bytes":
        return 8 * budget.value
    if budget.kind == "bits per weight":
        return budget.value * steps.float16_bits / 16
    return budget.value * len(steps.layer)


def _demote(
    steps: _Steps,
    taken: NDArray[np.bool_],
    cost: NDArray[np.int64],
    limit: float,
    pruning: PruningRule,
    what: str,
) -> NDArray[np.bool_]:
    """Take further steps, cheapest first, until the cost is within the limit.

    Args:
        steps, taken: all steps and those already made, bool [steps, channels].
        cost: bits of each channel at each width, int64 [steps + 1, channels].
        limit: largest sum of bits.
        pruning: limits on the last step.
        what: names the limit in the error.
    """
    saved = cost[:-1] - cost[1:]
    if int(cost[0].sum()) - int(saved[taken].sum()) <= limit:
        return taken
    # A step that saves nothing is a last resort: it may open the way to one that does.
    rho = np.where(saved > 0, steps.added / np.maximum(saved, 1), np.inf)
    order = _heap_order(np.where(taken, -np.inf, rho), steps.allowed)
    order = _within_caps(order, steps, pruning)
    total = int(cost[0].sum())
    already = int(taken.sum())
    # Cost after each number of steps, counted from none.
    after = total - np.concatenate([[0], np.cumsum(saved.T.ravel()[order])])
    met = np.flatnonzero(after[already:] <= limit + 1e-6)
    if len(met) == 0:
        raise QvlaError(
            f"{what} cannot be met: {limit:.0f} bits allowed, the least that widths "
            f"{steps.widths} and the pruning rule reach is {after.min()}; "
            "raise the budget or allow lower widths"
        )
    result = np.zeros(taken.size, dtype=bool)
    result[order[: already + met[0]]] = True
    return np.ascontiguousarray(result.reshape(taken.T.shape).T)


def _heap_order(rho: NDArray[np.float64], allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the steps in the order Algorithm 1's heap yields them.

    Indices count channels first: channel * steps + step.  int64 [allowed steps]
    """
    largest_so_far = np.maximum.accumulate(rho, axis=0).T.ravel()
    order = np.argsort(largest_so_far, kind="stable")
    # Only last steps are ever forbidden, so nothing waits behind them.
    return order[allowed.T.ravel()[order]]


def _within_caps(order: NDArray[np.int64], steps: _Steps, rule: PruningRule) -> NDArray[np.int64]:
    """Leave out prunings beyond the shares of a layer and of all channels."""
    if steps.widths[-1] != 0 or (rule.max_share >= 1 and rule.max_share_of_layer >= 1):
        return order
    count = len(steps.widths) - 1
    prunings = np.flatnonzero(order % count == count - 1)
    layer = steps.layer[order[prunings] // count]
    by_layer = np.argsort(layer, kind="stable")
    sizes = np.bincount(steps.layer)
    pruned = np.bincount(layer, minlength=len(sizes))
    rank = np.empty(len(layer), np.int64)
    rank[by_layer] = np.arange(len(layer)) - np.repeat(np.cumsum(pruned) - pruned, pruned)
    kept = rank < np.floor(rule.max_share_of_layer * sizes)[layer]
    kept &= np.cumsum(kept) <= np.floor(rule.max_share * len(steps.layer))
    return np.delete(order, prunings[~kept])


def _plan(
    sensitivities: Sensitivities,
    budget: Budget,
    target: Target,
    steps: _Steps,
    taken: NDArray[np.bool_],
) -> BitPlan:
    chosen = np.array(steps.widths, np.int8)[taken.sum(axis=0)]
    names = list(sensitivities.values)
    return BitPlan(
        widths={name: chosen[steps.layer == i] for i, name in enumerate(names)},
        weights_per_channel=dict(sensitivities.weights_per_channel),
        target=target.name,
        containers=dict(target.containers),
        quantizer=sensitivities.quantizer,
        budget=str(budget),
        policy_digest=sensitivities.policy_digest,
        sensitivities_digest=sensitivities.digest,
        calibration_digest=sensitivities.calibration_digest,
        expected_error=float(steps.added[taken].sum()),
    )

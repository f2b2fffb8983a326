"""Bucket sizes in the multiples that a target's kernels like: channels promoted to fill buckets up.

A plan's widths are changed, so fake quantization, the plan's bytes and the graph all agree. numpy
only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qvla_export.allocation.allocate import LatencyLimit
from qvla_export.quantizer.packed_storage import parallel_layers
from qvla_export.quantizer.plan import BitPlan
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Target

# Of smaller limits; two or three do.
_ROUNDS = 20
# Bytes and milliseconds move in steps: a limit that is lowered by less may change nothing.
_LEAST_STEP = 1.005


@dataclass
class _Group:
    """Channels that share buckets: those of layers that are merged, side by side.

    A coupled MLP's producers prune a unit together, so `units` ties their channels.
    """

    # int8 [channels], changed in place.
    widths: NDArray[np.int8]
    # Sensitivities at every width of the plan.  width -> float [channels]
    errors: dict[int, NDArray[np.float64]]
    # Channels of a unit that are pruned together.  int64 [units, channels of a unit]
    units: NDArray[np.int64]


def align_plan(plan: BitPlan, sensitivities: Sensitivities, target: Target) -> BitPlan:
    """Return the plan with bucket sizes rounded up to the target's multiple of channels.

    From the widest bucket down, each takes the channels of the next lower width that gain most in
    sensitivity; within a group all of them add the same bytes. The lowest kept width takes pruned
    channels, and whatever remains.

    Guaranteed: no channel gets a lower width, but a unit of an MLP that one producer prunes is
    pruned in both, which changes no number. Where the channels of the layers that are merged are a
    multiple, every bucket is; otherwise all but that of the lowest kept width are, as far as there
    are channels to promote. A multiple of 1 leaves the plan as it is.

    Args:
        plan: its layers and widths have sensitivities.
        sensitivities: what the plan was made of.
        target: its `channel_multiple`.
    """
    if target.channel_multiple == 1:
        return plan
    widths = _pruned_together(plan)
    for names, group in list(_groups(plan, widths, sensitivities)):
        _align(group, target.channel_multiple)
        parts = np.split(group.widths, np.cumsum([len(widths[name]) for name in names])[:-1])
        widths.update(zip(names, parts, strict=True))
    return replace(plan, widths=widths, expected_error=_error(plan, widths, sensitivities))


def align_within(
    allocate: Callable[[float, LatencyLimit | None], BitPlan],
    sensitivities: Sensitivities,
    target: Target,
    latency: LatencyLimit | None = None,
) -> BitPlan:
    """Return an aligned plan within the limits of the plan it was made of.

    Alignment adds bits and with them milliseconds, so the allocation gets smaller limits until the
    aligned plan keeps the given ones. The plan states those.

    Args:
        allocate: returns a plan within a share of the budget and within a limit on the latency.
        sensitivities, target: see `align_plan`.
        latency: the limit; None for none.

    Raises:
        QvlaError: no smaller limits help.
    """
    first = allocate(1.0, latency)
    # What is fast enough may leave bytes of the budget unused.
    whole = first if latency is None else allocate(1.0, None)
    plan, share, limit = first, 1.0, latency
    for attempt in range(1, _ROUNDS + 1):
        aligned = align_plan(plan, sensitivities, target)
        over = max(
            _ratio(aligned.weight_bytes, whole.weight_bytes),
            _ratio(aligned.mean_bits_per_channel, whole.mean_bits_per_channel),
        )
        late = 0.0 if latency is None else latency.used_by(aligned.widths)
        if max(over, late) <= 1:
            return replace(aligned, budget=first.budget)
        # Harder each time: what is hardly too much may come out the same again.
        if over > 1:
            share /= max(over, _LEAST_STEP) ** attempt
        if limit is not None and late > 1:
            limit = replace(limit, max_ms=limit.max_ms / max(late, _LEAST_STEP))
        plan = allocate(share, limit)
    raise QvlaError(
        f"no plan within {first.budget} has buckets of whole {target.channel_multiple} channels: "
        f"{aligned.weight_bytes} bytes instead of {whole.weight_bytes}"
        f"{f', {late:.2f} of the milliseconds' if latency else ''}; the layers are too small for "
        f"target {target.name!r}, raise the limit"
    )


def _ratio(found: float, allowed: float) -> float:
    """Share of what is allowed; a plan that prunes everything may have nothing, and has it."""
    return found / allowed if allowed else float(found > 0)


def _error(plan: BitPlan, widths: dict[str, NDArray[np.int8]], table: Sensitivities) -> float:
    """Sum of sensitivities; a unit pruned with another counts as it did, it was constant before."""
    total = 0.0
    for name, layer in widths.items():
        counted = np.where(layer == 0, plan.widths[name], layer)
        for bits in np.unique(counted).tolist():
            total += float(table.at(name, bits)[counted == bits].sum(dtype=np.float64))
    return total


def _pruned_together(plan: BitPlan) -> dict[str, NDArray[np.int8]]:
    """Prune a hidden unit in all producers of an MLP where one prunes it."""
    widths = {name: layer.copy() for name, layer in plan.widths.items()}
    for coupling in plan.couplings.values():
        producers = [widths[name] for name in coupling.producers]
        pruned = np.min(producers, axis=0) == 0
        for layer in producers:
            layer[pruned] = 0
    return widths


def _groups(
    plan: BitPlan, widths: dict[str, NDArray[np.int8]], sensitivities: Sensitivities
) -> Iterator[tuple[tuple[str, ...], _Group]]:
    kept = sorted({0, *plan.containers})
    coupled = {coupling.producers for coupling in plan.couplings.values()}
    for names in parallel_layers(widths, plan.weights_per_channel):
        joined = np.concatenate([widths[name] for name in names])
        present = [bits for bits in kept if bits in (*sensitivities.widths, 16)]
        errors = {
            bits: np.concatenate([sensitivities.at(name, bits) for name in names]).astype(float)
            for bits in present
        }
        units = np.arange(len(joined))[:, None]
        if any(set(names) == set(producers) for producers in coupled):
            units = np.arange(len(joined)).reshape(len(names), -1).T
        yield names, _Group(joined, errors, units)


def _align(group: _Group, multiple: int) -> None:
    """Round a group's buckets up, from the widest down."""
    used = sorted(set(group.widths.tolist()) - {0}, reverse=True)
    for place, bits in enumerate(used):
        for lower in used[place + 1 :]:
            missing = -int((group.widths == bits).sum()) % multiple
            if missing:
                _promote(group, np.flatnonzero(group.widths == lower)[:, None], bits, missing)
    kept = group.widths[group.widths > 0]
    if len(kept) == 0:
        return
    # Every wider bucket is whole now.
    lowest = int(kept.min())
    pruned = group.units[(group.widths[group.units] == 0).all(axis=1)]
    together = group.units.shape[1]
    missing = -int((kept == lowest).sum()) % multiple
    # Too few pruned units would only cost bytes.
    if missing % together == 0 and len(pruned) * together >= missing:
        _promote(group, pruned, lowest, missing // together)


def _promote(group: _Group, units: NDArray[np.int64], bits: int, count: int) -> None:
    """Give the units that gain most, at most `count`, a width; ties go to the first."""
    if not len(units):
        return
    now = group.widths[units[0, 0]]
    gain = (group.errors[int(now)] - group.errors[bits])[units].sum(axis=1)
    chosen = np.argsort(-gain, kind="stable")[:count]
    group.widths[units[chosen]] = bits

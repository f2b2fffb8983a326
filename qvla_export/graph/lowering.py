"""Float graph + plan -> the graph a target runs: all passes, in order."""

from collections.abc import Iterable

import onnx_ir as ir

from qvla_export.graph.buckets_to_onnx import (
    CODES_SUFFIX,
    COLUMNS_SUFFIX,
    HALVES_SUFFIX,
    MEMBERS_SUFFIX,
    MULTIPLIERS_SUFFIX,
    ORDER_SUFFIX,
    PAD_SUFFIXES,
    PIECES_SUFFIX,
    SCALES_SUFFIX,
    SLICE_SUFFIXES,
    ZERO_POINTS_SUFFIX,
    Store,
    keep,
)
from qvla_export.graph.float_graph import layer_nodes
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.compute_type import to_compute_type
from qvla_export.graph.passes.couple import couple_mlps
from qvla_export.graph.passes.float_storage import store_exactly
from qvla_export.graph.passes.integer_products import keep_integer_products
from qvla_export.graph.passes.merge import merge_parallel
from qvla_export.graph.passes.quantize_activations import quantize_activations
from qvla_export.graph.passes.rounding import merged_steps, round_weights, stored_steps
from qvla_export.graph.passes.weights import FOLDED_SUFFIX
from qvla_export.quantizer.packed_storage import stored_on
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.round_plan import require_rounded
from qvla_export.shared.target import Target, UnsupportedOnTarget

_ORDER_SUFFIXES = (
    ORDER_SUFFIX,
    COLUMNS_SUFFIX,
    PIECES_SUFFIX,
    MEMBERS_SUFFIX,
    *SLICE_SUFFIXES,
    *PAD_SUFFIXES,
)


def lower(
    graph: ir.Model, plan: BitPlan | None, target: Target, store: Store = keep
) -> tuple[ir.Model, dict[str, int]]:
    """Return a float graph as it is shipped, and the bytes of its constants by kind.

    The parts are "2", "4", "8", "16", "scales" (zero points and multipliers too), "order" (what
    restores the order of channels and fills inputs up) and "biases" (that take up what pruned
    units put out) of planned layers, "float" of layers without a plan, and "rest".

    Args:
        graph: from `export_float`; left as it is.
        plan: widths of the channels; None keeps every layer in float.
        target: whose containers and arithmetic the graph gets.
        store: gets packed constants layer by layer, as they are made; may put them on disk.

    Raises:
        UnsupportedOnTarget: the plan is for another target or has what this one lacks.
    """
    if plan is None:
        model = _finished(graph, target)
        return model, _float_bytes(model, _layer_weights(model))
    target = stored_on(target, plan.quantizer)
    _require_plan_for(plan, target)
    require_rounded(plan)
    if plan.rounding is not None:
        graph = round_weights(graph, plan)
    model, widths = couple_mlps(
        graph,
        plan.widths,
        plan.couplings.values(),
        plan.containers,
        compensated=plan.rounding is not None,
    )
    if plan.activations is not None:
        model = quantize_activations(model, plan.activations, target)
    model, widths = merge_parallel(model, widths, target.containers)
    steps = None
    if plan.rounding is not None:
        steps = merged_steps(stored_steps(plan), widths)
    rounded_inputs = plan.activations is not None
    model = bucketize(model, widths, plan.quantizer, target, store, steps, rounded_inputs)
    if rounded_inputs:
        model = keep_integer_products(model)
    model = _finished(model, target)
    return model, _bucket_bytes(model)


def _finished(model: ir.Model, target: Target) -> ir.Model:
    """Give what is not in buckets the target's compute type, or 16 bits where that is exact."""
    if target.compute == "float32":
        return store_exactly(model)
    return to_compute_type(model, target)


def _require_plan_for(plan: BitPlan, target: Target) -> None:
    if plan.target != target.name:
        raise UnsupportedOnTarget(
            f"the plan is for target {plan.target!r}, the graph for {target.name!r}; "
            f"plan again with --target {target.name}"
        )
    used = {bits for bits, channels in plan.histogram().items() if channels and bits}
    for bits in sorted(used):
        if plan.containers[bits] != target.containers.get(bits):
            raise UnsupportedOnTarget(
                f"the plan stores {bits} bits as {plan.containers[bits]}, target {target.name!r} "
                f"as {target.containers.get(bits)}; plan again for this version of the target"
            )
        container = target.containers[bits]
        rule = plan.quantizer.rules.get(bits)
        if container.bits != 16 and (rule is None or rule.group_size != container.group_size):
            raise UnsupportedOnTarget(
                f"the plan's {bits}-bit scales are one for {rule and rule.group_size} inputs, "
                f"target {target.name!r} has one for {container.group_size} (None: one a "
                "channel); measure and plan again for this target"
            )


def _layer_weights(model: ir.Model) -> set[str]:
    """Names of the constants behind the layers' weights, with or without a Cast in between."""
    found = set()
    for node in layer_nodes(model).values():
        value = node.inputs[1]
        cast = None if value is None else value.producer()
        stored = value if cast is None else cast.inputs[0]
        if stored is not None and stored.name is not None:
            found.add(stored.name)
    return found


def _float_bytes(model: ir.Model, layer_weights: set[str]) -> dict[str, int]:
    found = {"float": 0, "rest": 0}
    for name, nbytes in _constant_bytes(model):
        found["float" if name in layer_weights else "rest"] += nbytes
    return found


def _bucket_bytes(model: ir.Model) -> dict[str, int]:
    """Bytes of the constants by kind; see `lower`."""
    kinds = ("16", "8", "4", "2", "scales", "order", "biases", "rest")
    found: dict[str, int] = dict.fromkeys(kinds, 0)
    for name, nbytes in _constant_bytes(model):
        if name.endswith((SCALES_SUFFIX, ZERO_POINTS_SUFFIX, MULTIPLIERS_SUFFIX)):
            found["scales"] += nbytes
        elif name.endswith((CODES_SUFFIX, HALVES_SUFFIX)):
            found[name.rsplit(".", 2)[1].removeprefix("b")] += nbytes
        elif name.endswith(_ORDER_SUFFIXES):
            found["order"] += nbytes
        elif FOLDED_SUFFIX in name:
            found["biases"] += nbytes
        else:
            found["rest"] += nbytes
    return found


def _constant_bytes(model: ir.Model) -> Iterable[tuple[str, int]]:
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value.nbytes

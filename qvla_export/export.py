"""Policy + plan -> bundle."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qvla_export.artifacts import require_same
from qvla_export.bundle import PLAN, Bundle, Golden, Stage, TensorSpec
from qvla_export.bundle_writer import BundleParts, write_bundle
from qvla_export.float_graph import (
    POLICY_KEY,
    TARGET_KEY,
    ExportError,
    export_float,
)
from qvla_export.graph_figures import measure_graph
from qvla_export.layers import fake_quantized, layer_shapes
from qvla_export.lowering import lower
from qvla_export.observation import Observation
from qvla_export.plan import BitPlan
from qvla_export.policies.base import Policy
from qvla_export.target import Target

# Arithmetic of ONNX Runtime's MatMulNBits: 0 keeps activations in float32. 4 rounds them to 8 bits
# per block, which is faster but moves the action; see `engines.ort`.
FLOAT_ACTIVATIONS = {"accuracy_level": 0}
_LOGGER = logging.getLogger(__name__)


def export_bundle(
    policy: Policy,
    plan: BitPlan | None,
    target: Target,
    observations: Sequence[Observation],
    path: Path,
    float_graph: ir.Model | None = None,
    engine_options: Mapping[str, Any] = FLOAT_ACTIVATIONS,
) -> Bundle:
    """Write the bundle of a policy under a plan.

    Args:
        policy: the full-precision policy.
        plan: widths of the channels; None for the float bundle.
        target: what the bundle is made for; must be the plan's.
        observations: held-out; become the golden observations.
        path: folder to create or replace.
        float_graph: result of `export_float(policy, target)`, to share it between plans.
        engine_options: stored in the manifest and obeyed by the engine.

    Raises:
        PlanMismatch, ArtifactMismatch: the plan or the float graph is for another policy or target.
        ExportError: a planned layer cannot be bucketed, or there are no observations.
    """
    if not observations:
        raise ExportError("a bundle needs at least one golden observation, got none")
    if plan is not None:
        _require_planned_for(plan, policy, target)
    graph = export_float(policy, target) if float_graph is None else float_graph
    _require_traced_from(graph, policy, target)
    model, weight_bytes = lower(graph, plan, target)
    stage = Stage("policy", _specs(graph.graph.inputs), _specs(graph.graph.outputs))
    parts = BundleParts(
        target=target.name,
        processor=policy.processor,
        inputs=stage.inputs,
        outputs=stage.outputs,
        stages=(stage,),
        golden=golden_actions(policy, plan, observations),
        policy_digest=policy.digest,
        weight_bytes=weight_bytes,
        plan=None if plan is None else _summary(plan, model),
        engine_options=engine_options,
    )

    def save_files(folder: Path) -> None:
        ir.save(model, folder / stage.model, external_data=f"{stage.model}.data")
        if plan is not None:
            plan.save(folder / PLAN)

    bundle = write_bundle(path, parts, save_files)
    _LOGGER.info("bundle %s: %d bytes, %s", path, bundle.nbytes, dict(weight_bytes))
    return bundle


def _require_planned_for(plan: BitPlan, policy: Policy, target: Target) -> None:
    require_same("plan and target", plan.target, target.name, "Make the plan for this target.")
    plan.require_fits(layer_shapes(policy.layers()), policy.digest)


def _require_traced_from(graph: ir.Model, policy: Policy, target: Target) -> None:
    for key, expected in ((POLICY_KEY, policy.digest), (TARGET_KEY, target.name)):
        found = graph.metadata_props.get(key, "nothing")
        require_same(f"float graph and {key}", found, expected, "Export the float graph anew.")


def golden_actions(
    policy: Policy, plan: BitPlan | None, observations: Sequence[Observation]
) -> Golden:
    """Return model inputs of observations with torch's actions, quantized and full precision."""
    full_precision = _actions(policy, observations)
    reference = full_precision
    if plan is not None:
        with fake_quantized(policy, plan):
            reference = _actions(policy, observations)
    feeds = tuple(policy.processor.feeds(observation) for observation in observations)
    return Golden(feeds, reference, full_precision)


@torch.no_grad()
def _actions(policy: Policy, observations: Sequence[Observation]) -> NDArray[np.float32]:
    """Normalized actions one observation at a time, as the engine computes them."""
    chunks = [policy.greedy_actions(policy.batch([item])).numpy() for item in observations]
    return np.concatenate(chunks)


def _summary(plan: BitPlan, model: ir.Model) -> dict[str, Any]:
    return {
        "budget": plan.budget,
        "mean_bits_per_channel": plan.mean_bits_per_channel,
        "mean_bits_per_weight": plan.mean_bits_per_weight,
        "stored_bits_per_weight": plan.stored_bits_per_weight,
        "weight_bytes": plan.weight_bytes,
        "float16_bytes": plan.float16_bytes,
        "channels_by_width": {str(bits): n for bits, n in plan.histogram().items()},
        "graph": asdict(measure_graph(model, plan)),
    }


def _specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(value) for value in values)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.dtype is not None and value.shape is not None
    sizes = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, sizes)

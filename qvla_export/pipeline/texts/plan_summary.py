"""What `qvla plan` says of a plan: lines for a terminal, figures for a script."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qvla_export.allocation.allocate import least_error
from qvla_export.pipeline.plan import PlanOptions
from qvla_export.quantizer.plan import BitPlan
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.target import Target


def plan_lines(
    planned: BitPlan, path: Path, measured: Sensitivities, target: Target, options: PlanOptions
) -> Iterator[str]:
    """Yield how large a plan is, how far from the bound, and how long an action is predicted."""
    yield (
        f"plan: {planned.mean_bits_per_channel:.2f} mean bits per channel, "
        f"{planned.mean_bits_per_weight:.2f} per weight, "
        f"{planned.stored_bits_per_weight:.2f} stored, {planned.ratio:.3f} of float16 "
        f"-> {path}"
    )
    request, limit = options.request, options.latency
    if planned.expected_error is None or request is None:
        yield "additive error: unknown, the plan is uniform"
        return
    text = f"{request.allocator.name}: additive error {planned.expected_error:.4g}"
    if request.budget.kind != "bytes":
        least = least_error(measured, request.budget, target, request.widths, request.pruning)
        text += f", at least {least:.4g} under this budget"
    if limit is not None:
        predicted = limit.model.predict(planned.widths, limit.activations)
        text += f"; an action: predicted {predicted.total_ms:.2f} ms ({limit})"
    yield text


def plan_figures(planned: BitPlan, path: Path) -> dict[str, Any]:
    """Return the figures of a plan and where it is, as JSON values."""
    return {
        "plan": str(path),
        "mean_bits_per_channel": planned.mean_bits_per_channel,
        "mean_bits_per_weight": planned.mean_bits_per_weight,
        "stored_bits_per_weight": planned.stored_bits_per_weight,
        "weight_bytes": planned.weight_bytes,
        "ratio": planned.ratio,
        "expected_error": planned.expected_error,
    }

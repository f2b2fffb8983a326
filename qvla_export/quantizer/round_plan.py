"""Plans whose codes are made from what the layers are fed: making them, attaching them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.compensation import round_layer
from qvla_export.quantizer.elimination import Elimination
from qvla_export.quantizer.moments import LayerMoments, Moments
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import as_rows
from qvla_export.quantizer.rounding import RoundedLayer, Rounding
from qvla_export.shared.artifacts import require_same
from qvla_export.shared.errors import PlanMismatch


class WeightSource(Protocol):
    """What weights are read from: a policy, as far as rounding needs it."""

    @property
    def digest(self) -> str:
        """SHA-256 of the checkpoint."""
        ...

    def read_weight(self, name: str) -> NDArray[np.float32]:
        """Return a parameter by name."""
        ...


def round_plan(
    policy: WeightSource,
    plan: BitPlan,
    moments: Moments,
    on_progress: Callable[[int, int], None] | None = None,
    elimination: Elimination | None = None,
) -> BitPlan:
    """Return a plan with the codes of all its layers, made layer by layer.

    Args:
        policy: its weights are read one layer at a time.
        plan: its quantizer says how.
        moments: of this policy, on the plan's calibration set.
        on_progress: called with (layers done, layers in all).
        elimination: array operations and blocks; None for numpy's.

    Raises:
        ArtifactMismatch: the moments are of another policy or calibration set.
        QvlaError: moments of a layer are missing.
    """
    require_same(
        "policy and plan", plan.policy_digest, policy.digest, "Make the plan of this policy."
    )
    moments.require_of(policy.digest, plan.calibration_digest)
    layers: dict[str, RoundedLayer] = {}
    for name in plan.widths:
        fed = moments.of(name, plan.shapes[name])
        layers[name] = round_plan_layer(policy, plan, name, fed, elimination or Elimination())
        if on_progress is not None:
            on_progress(len(layers), len(plan.widths))
    return with_rounding(plan, Rounding(layers, plan.digest, moments.digest))


def round_plan_layer(
    policy: WeightSource, plan: BitPlan, name: str, fed: LayerMoments, elimination: Elimination
) -> RoundedLayer:
    """Return the codes of one of a plan's layers.

    Args:
        policy: the layer's weights are read from it.
        plan: its quantizer says how.
        name: of the layer.
        fed: the layer's moments.
        elimination: array operations and blocks.
    """
    gone = [c.constant_units for c in plan.couplings.values() if name in c.producers]
    return round_layer(
        as_rows(policy.read_weight(f"{name}.weight")),
        plan.widths[name],
        plan.quantizer,
        fed,
        plan.stored_order(name),
        gone[-1] if gone else np.zeros(0, np.int64),
        elimination,
    )


def with_rounding(plan: BitPlan, rounding: Rounding) -> BitPlan:
    """Attach the codes that were made for a plan.

    Raises:
        ArtifactMismatch: they are of another plan; names both digests.
    """
    again = "Round the weights again: qvla round."
    require_same("plan and rounding", rounding.plan_digest, plan.digest, again)
    return replace(plan, rounding=rounding)


def require_rounded(plan: BitPlan) -> None:
    """Refuse a plan whose codes are still to be made.

    Raises:
        PlanMismatch: the quantizer needs a rounding and there is none of all layers.
    """
    found = set() if plan.rounding is None else set(plan.rounding.layers)
    if plan.quantizer.needs_moments and found != set(plan.widths):
        raise PlanMismatch(
            f"the plan's quantizer makes codes from what the layers are fed; of "
            f"{len(plan.widths)} layers {len(found)} have them: make them with qvla round"
        )

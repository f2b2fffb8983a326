"""The plan of one width for every channel: the round-to-nearest baseline. numpy only."""

import numpy as np

from qvla_export.quantizer.layer_shapes import LayerShapes
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import QuantizerSpec, spec_for
from qvla_export.shared.target import Target


def uniform_plan(
    shapes: LayerShapes,
    bits: int,
    target: Target,
    policy_digest: str,
    quantizer: QuantizerSpec | None = None,
) -> BitPlan:
    """Return the plan of one width; by the target's quantizer unless another is given."""
    return BitPlan(
        widths={name: np.full(channels, bits, np.int8) for name, (channels, _) in shapes.items()},
        weights_per_channel={name: inputs for name, (_, inputs) in shapes.items()},
        target=target.name,
        containers=dict(target.containers),
        quantizer=quantizer or spec_for(target),
        budget=f"uniform {bits} bits",
        allocation={"method": "uniform", "widths": [bits]},
        policy_digest=policy_digest,
    )

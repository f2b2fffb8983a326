"""Plans with widths drawn at random: what a mix of widths costs, no policy measured."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.coupling import find_couplings
from qvla_export.quantizer.layer_shapes import LayerShapes
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import spec_for
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WIDTHS, Target


def draw_plan(
    shapes: LayerShapes,
    shares: Mapping[int, float],
    target: Target,
    policy_digest: str,
    seed: int = 0,
) -> BitPlan:
    """Return a plan that gives every layer the same shares of channels at each width.

    The producers of an MLP prune the same hidden units, so that a share of 0 bits removes that
    share of the units and no more.

    Args:
        shapes: layer name -> (channels, weights of one channel).
        shares: width -> share of a layer's channels; sum to 1.
        target: of the plan.
        policy_digest: of the policy it is for.
        seed: of the draw.

    Raises:
        QvlaError: an unknown width, or shares that do not sum to 1.
    """
    if not set(shares) <= set(WIDTHS) or abs(sum(shares.values()) - 1) > 1e-6:
        raise QvlaError(f"shares of widths {WIDTHS} must sum to 1, got {dict(shares)}")
    generator = np.random.default_rng(seed)
    sizes = {name: channels for name, (channels, _) in shapes.items()}
    inputs = {name: count for name, (_, count) in shapes.items()}
    widths = {name: _draw_widths(channels, shares, generator) for name, channels in sizes.items()}
    for coupling in find_couplings(widths, inputs):
        pruned = widths[coupling.producers[0]] == 0
        for other in coupling.producers[1:]:
            kept = widths[other][widths[other] > 0]
            widths[other] = np.zeros_like(widths[other])
            widths[other][~pruned] = generator.permutation(kept)
    mean = sum(bits * share for bits, share in shares.items())
    return BitPlan(
        widths=widths,
        weights_per_channel=inputs,
        target=target.name,
        containers=dict(target.containers),
        quantizer=spec_for(target),
        budget=f"drawn at random, {mean:g} mean bits per channel",
        allocation={"method": "drawn", "shares": {str(b): s for b, s in sorted(shares.items())}},
        policy_digest=policy_digest,
    )


def _draw_widths(
    channels: int, shares: Mapping[int, float], generator: np.random.Generator
) -> NDArray[np.int8]:
    """Widths in exactly these shares, up to rounding, in random order."""
    order = sorted(shares, reverse=True)
    stops = np.rint(np.cumsum([shares[bits] for bits in order]) * channels).astype(int)
    counts = np.diff(np.concatenate([[0], stops]))
    return generator.permutation(np.repeat(np.array(order, np.int8), counts))

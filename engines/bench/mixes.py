"""Mixes of widths that are measured: those of the reference policy, and one without pruning."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engines.bench.decoder import DIGEST
from qvla_export.allocation.random_plan import draw_plan
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.layer_shapes import LayerShapes
from qvla_export.quantizer.plan import BitPlan
from qvla_export.shared.target import Target


@dataclass(frozen=True)
class Mix:
    """Shares of a layer's channels at each width, and how the plan is run."""

    name: str
    # Width -> share.
    shares: Mapping[int, float]
    # Whether the layers' inputs are rounded to 8 bits.
    rounds_inputs: bool = False
    # `accuracy_level` of `engines.ort.ort_options`.
    accuracy_level: int = 0
    unpacked: bool = False

    def plan(self, shapes: LayerShapes, target: Target, ranges: ActivationRanges) -> BitPlan:
        """Draw the widths; where inputs are rounded, scales have two levels."""
        if not self.rounds_inputs:
            return draw_plan(shapes, self.shares, target, DIGEST)
        drawn = draw_plan(shapes, self.shares, target.with_two_level_scales(), DIGEST)
        return replace(drawn, activations=ranges)


# Plan w4 of the reference policy on `cpu`, all layers (0: 31, 2: 9, 4: 30, 8: 30 %, 3.82 bits a
# channel), its shares of 0 and 8 bits changed to 4.0; w3 as it is. Nothing pruned: 4.0 bits too.
W4 = {16: 0.003, 8: 0.322, 4: 0.30, 2: 0.09, 0: 0.285}
W3 = {8: 0.137, 4: 0.361, 2: 0.134, 0: 0.368}
W4_UNPRUNED = {8: 0.13, 4: 0.61, 2: 0.26}
# With rounded inputs, where a layer is one product: 30 % pruned, and 8, 4, 3 or 2 mean bits.
W8A8 = {8: 0.7, 0: 0.3}
W4A8 = {8: 0.345, 4: 0.265, 2: 0.09, 0: 0.3}
W3A8 = {8: 0.115, 4: 0.455, 2: 0.13, 0: 0.3}
W2A8 = {4: 0.3, 2: 0.4, 0: 0.3}
# Level 4 rounds activations to 8 bits per block: another arithmetic than level 0, whose 8- and
# 2-bit products unpack their weights in every run.
_ROUNDED = 4

MIXES = (
    Mix("ours w8a8", {8: 1.0}, rounds_inputs=True),
    Mix("ours w8a8, 30 % pruned", W8A8, rounds_inputs=True),
    Mix("ours w4a8, 30 % pruned", W4A8, rounds_inputs=True),
    Mix("ours w3a8, 30 % pruned", W3A8, rounds_inputs=True),
    Mix("ours w2a8, 30 % pruned", W2A8, rounds_inputs=True),
    Mix("ours w4", W4, accuracy_level=_ROUNDED),
    Mix("ours w4, nothing pruned", W4_UNPRUNED, accuracy_level=_ROUNDED),
    Mix("ours w4, exact activations", W4),
    Mix("ours w4, unpacked", W4, unpacked=True),
    Mix("ours w3", W3, accuracy_level=_ROUNDED),
)

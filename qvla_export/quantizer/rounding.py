"""The noun `Rounding`: codes and scales of a plan's layers. numpy only.

Where a plan's quantizer does more than round each weight to the nearest, the codes depend on what
the layers are fed. They are made once, by `quantizer.compensation`, and fake quantization, golden
actions and packing all take them from here.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.layer_artifact import FileKind, LayerArtifact
from qvla_export.quantizer.quantize import QuantizerSpec, with_steps
from qvla_export.quantizer.scale_search import Steps, storable_scales
from qvla_export.shared.artifacts import versions
from qvla_export.shared.errors import QvlaError


@dataclass(frozen=True)
class RoundedLayer:
    """Codes of one layer; channels and inputs are in their natural order.

    Raises:
        QvlaError: shapes that disagree.
    """

    # Zero where the channel has 0 or 16 bits, or the input is a hidden unit that leaves the graph.
    # int8 [channels, inputs]
    codes: NDArray[np.int8]
    # Weights of the channels of 16 bits, in order.  float16 [channels of 16 bits, inputs]
    halves: NDArray[np.float16]
    # As stored, of groups in the stored order of the inputs. Where a channel has one scale, the
    # first counts; channels of 0 and 16 bits have ones.  float32 [channels, groups]
    scales: NDArray[np.float32]
    # Beside the scales; None where no width has them, 0 where a channel's has none.
    # int8 [channels, groups]
    zero_points: NDArray[np.int8] | None = None
    # Of scales of two levels, the groups' multiples of their channel's; None where no width has
    # them, 1 where a channel's has none.  uint8 [channels, groups]
    multipliers: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        channels, inputs = self.codes.shape
        beside = [values for values in (self.zero_points, self.multipliers) if values is not None]
        if (
            self.scales.ndim != 2
            or len(self.scales) != channels
            or self.halves.shape[1:] != (inputs,)
            or any(values.shape != self.scales.shape for values in beside)
            or (self.multipliers is not None and not self.multipliers.all())
        ):
            raise QvlaError(
                f"codes {list(self.codes.shape)} do not go with halves {list(self.halves.shape)} "
                f"and scales {list(self.scales.shape)}, their zero points or multipliers"
            )

    @property
    def steps(self) -> Steps:
        """What its codes stand for."""
        return Steps(self.scales, self.zero_points, self.multipliers)

    def rows(
        self, widths: NDArray[np.int8], spec: QuantizerSpec, order: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return the weights an engine computes with.

        Args:
            widths: of the plan, int8 [channels].
            spec: its quantizer.
            order: inputs that the graph keeps, as it stores them.  int64 [kept]

        Returns:
            float32 [channels, inputs]; zero where an input is not kept.
        """
        result = np.zeros(self.codes.shape, np.float32)
        for bits in np.unique(widths).tolist():
            chosen = widths == bits
            if bits == 16:
                result[chosen] = self.halves
            elif bits:
                codes = self.codes[np.ix_(np.flatnonzero(chosen), order)]
                steps = self.steps.of(chosen, spec.rule(bits).groups(len(order)))
                weight = with_steps(codes, bits, spec, steps)
                result[np.ix_(np.flatnonzero(chosen), order)] = weight.dequantize()
        return result

    def with_scales(
        self, factors: NDArray[np.float32], widths: NDArray[np.int8], spec: QuantizerSpec
    ) -> "RoundedLayer":
        """Return the same codes at scales that are so many times the present ones, as stored.

        Args:
            factors: float32 [channels, groups]; where a channel has one scale, the first counts.
            widths: of the plan, int8 [channels].
            spec: its quantizer.
        """
        scales = self.scales.copy()
        for bits in np.unique(widths[(widths > 0) & (widths < 16)]).tolist():
            chosen, rule = widths == bits, spec.rule(bits)
            if rule.two_level:
                # One factor moves a channel's scale, and so all of its groups.
                assert self.multipliers is not None
                changed = self.steps.of(chosen).channel_scales * factors[chosen, :1]
                stored = storable_scales(changed, rule.scale_bits)
                scales[chosen] = stored * self.multipliers[chosen]
            else:
                changed = scales[chosen] * factors[chosen]
                scales[chosen] = storable_scales(changed, rule.scale_bits)
        return replace(self, scales=scales)


@dataclass(frozen=True)
class Rounding(LayerArtifact):
    """Codes of all layers of a plan.

    Those of a layer lie in memory only while someone uses them, where they were read from a file.
    """

    kind = FileKind("qvla-rounding-2", "rounding", "make it anew: qvla round", RoundedLayer, True)

    # Layer name -> its codes, in forward order.
    layers: Mapping[str, RoundedLayer]
    plan_digest: str
    moments_digest: str
    made_with: Mapping[str, str] = field(default_factory=versions)

    def restricted_to(self, names: Collection[str]) -> "Rounding":
        """Return the rounding of some of its layers."""
        return replace(self, layers={n: layer for n, layer in self.layers.items() if n in names})

"""What a quantizer adds to the weights of a layer, every channel at one width by itself."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qvla_export.measurement.layer_groups import LayerNeeds, NeedsOf, layer_needs
from qvla_export.measurement.torch_arrays import elimination_on
from qvla_export.policies.layers import Layer, error_rows, layer_shapes, weight_rows
from qvla_export.quantizer.compensation import rounded_alone
from qvla_export.quantizer.moments import Moments
from qvla_export.quantizer.quantize import QuantizerSpec
from qvla_export.quantizer.rounding_costs import alone_bytes, alone_bytes_per_weight

_NOTHING = np.zeros((0, 0), np.float32)


def weight_errors(
    name: str,
    layer: Layer,
    widths: tuple[int, ...],
    quantizer: QuantizerSpec,
    moments: Moments | None = None,
    channels: slice = slice(None),
) -> dict[int, Tensor]:
    """Return the errors of channels by width; nothing is computed for 0 bits.

    Channels do not answer each other's errors here: a sensitivity is of one channel alone.

    Args:
        name: of the layer.
        layer: its weights stay as they are.
        widths: among 0, 2, 4, 8, 16.
        quantizer: how.
        moments: where the quantizer needs them.
        channels: which; all by default.

    Returns:
        Width -> float32 [channels, inputs]

    Raises:
        QvlaError: moments are needed and there are none of this layer.
    """
    if moments is not None:
        own = moments.of(name, layer_shapes({name: layer})[name])
        rows = weight_rows(layer, channels)
        coded = [bits for bits in widths if bits]
        how = elimination_on(layer.weight.device)
        # Some of a layer's channels are rounded as all of them are.
        how = replace(how, blocking=how.blocking_of(len(layer.weight)))
        made = rounded_alone(rows, coded, quantizer, own, how)
        errors = {bits: weights - rows for bits, weights in zip(coded, made, strict=True)}
    else:
        errors = {bits: error_rows(layer, bits, quantizer, channels) for bits in widths if bits}
    return {
        bits: torch.from_numpy(errors.get(bits, _NOTHING)).to(layer.weight.device)
        for bits in widths
    }


def error_needs(quantizer: QuantizerSpec, widths: tuple[int, ...]) -> NeedsOf:
    """Return what tells the needs of layers whose errors `weight_errors` makes.

    Args:
        quantizer: how.
        widths: that are measured.
    """

    def needs_of(
        layers: Mapping[str, Layer], moved: Mapping[str, tuple[int, int]]
    ) -> dict[str, LayerNeeds]:
        nearest = layer_needs(layers, moved, widths)
        if not quantizer.needs_moments:
            return nearest
        shapes = layer_shapes({name: layers[name] for name in moved})
        return {name: _with_answers(needs, shapes[name][1]) for name, needs in nearest.items()}

    return needs_of


def _with_answers(needs: LayerNeeds, inputs: int) -> LayerNeeds:
    """Add the inputs' moments, their factors, and the weights on their way."""
    made, met = needs.phases
    matrices = alone_bytes(needs.channels, inputs) + 4 * needs.channels**2
    answered = replace(made, passes=matrices, passes_per_channel=alone_bytes_per_weight() * inputs)
    return replace(needs, phases=(answered, met))

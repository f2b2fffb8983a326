"""What a quantizer adds to the weights of a layer, every channel at one width by itself."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.measurement.layer_groups import LayerNeeds, NeedsOf, layer_needs
from qvla_export.policies.layers import Layer, error_rows, layer_shapes, weight_rows
from qvla_export.quantizer.compensation import round_layer
from qvla_export.quantizer.moments import LayerMoments, Moments
from qvla_export.quantizer.quantize import QuantizerSpec

# What compensation takes for each pair of inputs, and for each weight, as float64 for the most
# part.
_BYTES_PER_PAIR, _BYTES_PER_ANSWER = 56, 80


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
    found = {}
    for bits in widths:
        if bits == 0:
            rows = np.zeros((0, 0), np.float32)
        elif moments is None:
            rows = error_rows(layer, bits, quantizer, channels)
        else:
            own = moments.of(name, layer_shapes({name: layer})[name])
            rows = _answered(weight_rows(layer, channels), bits, quantizer, own)
        found[bits] = torch.from_numpy(rows).to(layer.weight.device)
    return found


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
        return {name: _with_answers(needs) for name, needs in nearest.items()}

    return needs_of


def _with_answers(needs: LayerNeeds) -> LayerNeeds:
    """Add the inputs' moments, their inverse and factors, and the weights on their way."""
    matrices = _BYTES_PER_PAIR * needs.inputs**2 + 4 * needs.channels**2
    return replace(
        needs, more_bytes=matrices, more_bytes_per_channel=_BYTES_PER_ANSWER * needs.inputs
    )


def _answered(
    rows: NDArray[np.float32], bits: int, quantizer: QuantizerSpec, own: LayerMoments
) -> NDArray[np.float32]:
    alone = quantizer
    if quantizer.compensation != "none":
        alone = replace(quantizer, compensation="inputs")
    widths, order = np.full(len(rows), bits, np.int8), np.arange(rows.shape[1])
    made = round_layer(rows, widths, alone, own, order)
    errors: NDArray[np.float32] = made.rows(widths, alone, order) - rows
    return errors

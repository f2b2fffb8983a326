"""A layer's channels and weight grouped by width, and the way back to their order. numpy only."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.packed_storage import joined_widths
from qvla_export.quantizer.quantize import QuantizerSpec, at_steps, quantize_channels
from qvla_export.quantizer.quantized_weight import QuantizedWeight
from qvla_export.quantizer.scale_search import Steps
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WIDTHS, Container


@dataclass(frozen=True)
class ChannelBuckets:
    """Channel order, runs of equal width, inverse order of one layer."""

    # Of each channel.  int8 [channels]
    widths: NDArray[np.int8]
    # Channels by falling width; equal widths keep their order.  int64 [channels]
    order: NDArray[np.int64]
    # (bits, start, stop) into `order`, only for widths that occur; 0 bits is last.
    runs: tuple[tuple[int, int, int], ...]
    # concat(outputs of the runs, zeros for 0 bits)[inverse] is the layer's output.
    # int64 [channels]
    inverse: NDArray[np.int64]

    @property
    def computed_channels(self) -> int:
        """Return the number of channels that are computed: all but those of 0 bits."""
        return sum(stop - start for bits, start, stop in self.runs if bits)

    def channels(self, bits: int) -> NDArray[np.int64]:
        """Return the layer's channels of one width, in stored order.  int64 [n], maybe empty"""
        for width, start, stop in self.runs:
            if width == bits:
                return self.order[start:stop]
        return self.order[:0]


def bucket_channels(widths: NDArray[np.int8]) -> ChannelBuckets:
    """Group a layer's channels by width.

    Args:
        widths: int8 [channels], each in {0, 2, 4, 8, 16}.

    Raises:
        QvlaError: another width, or no vector.
    """
    if widths.ndim != 1:
        raise QvlaError(f"widths must be a vector [channels], got shape {list(widths.shape)}")
    values = widths.astype(np.int64)
    unknown = sorted(set(values.tolist()) - set(WIDTHS))
    if unknown:
        raise QvlaError(f"widths must be among {WIDTHS}, got {unknown}")
    order = np.argsort(-values, kind="stable").astype(np.int64)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    runs = []
    start = 0
    for bits in sorted(WIDTHS, reverse=True):
        stop = start + int((values == bits).sum())
        if stop > start:
            runs.append((bits, start, stop))
        start = stop
    return ChannelBuckets(widths, order, tuple(runs), inverse)


@dataclass(frozen=True)
class BucketedWeight:
    """A layer's weight, one `QuantizedWeight` for each width that occurs except 0."""

    buckets: ChannelBuckets
    weights: tuple[QuantizedWeight, ...]

    @property
    def channels(self) -> int:
        """Return the number of output channels, pruned ones included."""
        return len(self.buckets.order)


def bucket_weight(
    rows: NDArray[np.float32],
    widths: NDArray[np.int8],
    spec: QuantizerSpec,
    steps: Steps | None = None,
) -> BucketedWeight:
    """Quantize a layer's rows, each at its width.

    Args:
        rows: float32 [channels, inputs].
        widths: int8 [channels].
        spec: the quantizer.
        steps: those the rows were rounded at, of [channels, groups]; the first counts where a
            channel has one. None chooses them from the rows.
    """
    buckets = bucket_channels(widths)
    weights = []
    for bits, _, _ in buckets.runs:
        channels = buckets.channels(bits)
        if bits in spec.rules and steps is not None:
            chosen = steps.of(channels, spec.rule(bits).groups(rows.shape[1]))
            weights.append(at_steps(rows[channels], bits, spec, chosen))
        elif bits:
            weights.append(quantize_channels(rows[channels], bits, spec))
    return BucketedWeight(buckets, tuple(weights))


def expanded_weight(weight: BucketedWeight, containers: Mapping[int, Container]) -> BucketedWeight:
    """Return a layer with codes that a target stores expanded in one bucket with those of 8 bits.

    Its channels are in the layer's order, each with one scale.

    Args:
        weight: each channel at its width.
        containers: of the target.
    """
    buckets = bucket_channels(joined_widths(weight.buckets.widths, containers))
    parts = [part for part in weight.weights if part.bits != 16]
    if not any(containers[part.bits].is_expanded for part in parts):
        return weight
    found = np.concatenate([weight.buckets.channels(part.bits) for part in parts])
    order = np.argsort(found)
    codes = np.concatenate([part.expanded() for part in parts])[order]
    scales = np.concatenate([part.scales for part in parts])[order]
    halves = tuple(part for part in weight.weights if part.bits == 16)
    return BucketedWeight(buckets, (*halves, QuantizedWeight(codes, scales, 8, None)))

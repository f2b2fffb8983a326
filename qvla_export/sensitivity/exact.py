"""Exact sensitivities (eq. 4): quantize one channel, run forward, measure the action deviation.

`measurement.partial_forward` runs only what the channel can change, and many channels side by side.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qvla_export.measurement.distributed import World
from qvla_export.measurement.partial_forward import PartialForward, recorded
from qvla_export.measurement.sharded_sums import OnProgress, ShardedSums
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import traced_layers, weight_rows
from qvla_export.quantizer.quantize import QuantizerSpec, quantize_channels
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

METHOD = "exact"
# Pairs between two writes of the progress.
_UNIT_PAIRS = 256

Layers = Mapping[str, nn.Linear | nn.Conv2d]


@dataclass(frozen=True)
class ChannelWidth:
    """One channel at one width: what an exact measurement is of."""

    layer: str
    channel: int
    bits: int


def measure_exact(
    policy: Policy,
    observations: Sequence[Observation],
    pairs: Sequence[ChannelWidth],
    quantizer: QuantizerSpec,
    batch_size: int = 8,
    on_progress: OnProgress | None = None,
    side_by_side: int = 4,
    progress_file: Path | None = None,
    world: World | None = None,
    calibration_digest: str = "",
) -> NDArray[np.float64]:
    """Return mean over observations of ||dA||^2 for each pair.  float64 [pairs]

    Args:
        policy: float32; left as it is.
        observations: at least one.
        pairs: channels and widths; every other channel stays in float.
        quantizer: as in the plan.
        batch_size: observations that run together.
        on_progress: called with (pairs done, pairs in all), each counted once a batch.
        side_by_side: channels of a layer that run together; a run is of `batch_size` times as many.
        progress_file: as in `first_order.measure_first_order`.
        world: the processes that share the work; all get the result.
        calibration_digest: of the set that the observations came from; progress is of one only.

    Raises:
        QvlaError: no observations, or a layer or channel that the policy lacks.
    """
    if not observations or batch_size < 1 or side_by_side < 1:
        raise QvlaError(
            "exact sensitivities need at least one observation, batch_size and side_by_side of at "
            f"least 1, got {len(observations)}, {batch_size} and {side_by_side}"
        )
    layers = traced_layers(policy)
    _require_pairs(layers, pairs)
    # By layer, so that channels of one layer meet.
    place = {name: i for i, name in enumerate(layers)}
    order = sorted(range(len(pairs)), key=lambda i: place[pairs[i].layer])
    pieces = [order[i : i + _UNIT_PAIRS] for i in range(0, len(order), _UNIT_PAIRS)]
    batches = -(-len(observations) // batch_size)
    identity = {
        "exact": _digest(pairs),
        "policy_digest": policy.digest,
        "calibration_digest": calibration_digest,
        "observations": [len(observations), batch_size],
        "quantizer": quantizer.to_json(),
    }
    sums = ShardedSums({"pairs": np.zeros(len(pairs))}, identity, progress_file, world)
    mine = sums.share(range(batches * len(pieces)))
    for batch in range(batches):
        todo = [unit for unit in mine if unit // len(pieces) == batch]
        if not todo:
            continue
        inputs = policy.batch(observations[batch * batch_size : (batch + 1) * batch_size])
        with recorded(policy, layers, inputs) as forward:
            for unit in todo:
                for chunk in _chunks(pairs, pieces[unit % len(pieces)], side_by_side):
                    chosen = [pairs[i] for i in chunk]
                    sums.values["pairs"][chunk] += _deviations(forward, layers, chosen, quantizer)
                sums.mark(unit)
                if on_progress is not None:
                    done = sums.done(range(batches * len(pieces)))
                    whole = len(pairs) * batches
                    on_progress(min(whole, done * _UNIT_PAIRS), whole)
    return sums.total()["pairs"] / len(observations)


def all_pairs(shapes: Mapping[str, tuple[int, int]], widths: Sequence[int]) -> list[ChannelWidth]:
    """Return every channel at every width: by layer, then width, then channel."""
    return [
        ChannelWidth(name, channel, bits)
        for name, (channels, _) in shapes.items()
        for bits in widths
        for channel in range(channels)
    ]


def _digest(pairs: Sequence[ChannelWidth]) -> str:
    """SHA-256 of the pairs in their order; all of a policy would fill every journal."""
    text = json.dumps([[p.layer, p.channel, p.bits] for p in pairs])
    return hashlib.sha256(text.encode()).hexdigest()


def _require_pairs(layers: Layers, pairs: Sequence[ChannelWidth]) -> None:
    for pair in pairs:
        if pair.layer not in layers or not 0 <= pair.channel < len(layers[pair.layer].weight):
            raise QvlaError(f"the policy has no channel {pair.channel} of layer {pair.layer!r}")


def _chunks(pairs: Sequence[ChannelWidth], piece: Sequence[int], most: int) -> Iterator[list[int]]:
    """Cut indices of pairs, sorted by layer, into runs of one layer each."""
    chunk: list[int] = []
    for i in piece:
        if chunk and (len(chunk) == most or pairs[chunk[0]].layer != pairs[i].layer):
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def _deviations(
    forward: PartialForward, layers: Layers, pairs: Sequence[ChannelWidth], quantizer: QuantizerSpec
) -> NDArray[np.float64]:
    """Squared deviations of pairs of one layer, summed over a batch.  float64 [pairs]"""
    name = pairs[0].layer
    rows = _changed_rows(layers[name], pairs, quantizer).to(forward.reference)
    found = forward.deviations(name, [pair.channel for pair in pairs], rows)
    summed: NDArray[np.float64] = found.sum(dim=1).cpu().numpy()
    return summed


def _changed_rows(
    layer: nn.Linear | nn.Conv2d, pairs: Sequence[ChannelWidth], quantizer: QuantizerSpec
) -> torch.Tensor:
    """What quantization adds to each pair's row.  float32 [pairs, inputs]"""
    rows = weight_rows(layer)[[p.channel for p in pairs]]
    quantized = [
        quantize_channels(row[None], pair.bits, quantizer).dequantize()
        for row, pair in zip(rows, pairs, strict=True)
    ]
    return torch.from_numpy(np.concatenate(quantized) - rows)

"""Exact sensitivities (eq. 4): quantize one channel, run forward, measure the action deviation.

`measurement.partial_forward` runs only what the channel can change, and many channels side by side,
in float64: two passes in float32 differ by more than many channels of 8 bits move the action.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qvla_export.measurement.double_precision import batch_in_float64, in_float64
from qvla_export.measurement.partial_forward import recorded
from qvla_export.measurement.sharded_sums import ShardedSums
from qvla_export.measurement.weight_errors import weight_errors
from qvla_export.policies.layers import Layers, layer_shapes, traced_layers, weight_rows
from qvla_export.sensitivity.estimators.base import (
    QUIETLY,
    ChannelWidth,
    Question,
    Work,
    all_pairs,
)
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError

# Pairs between two writes of the progress.
_UNIT_PAIRS = 256


@dataclass(frozen=True)
class ExactEstimator:
    """One forward pass a channel, width and observation, of what the channel can change."""

    # Channels of a layer that run together; a run is of the batch size times as many.
    side_by_side: int = 4

    def __post_init__(self) -> None:
        if self.side_by_side < 1:
            raise QvlaError(f"side_by_side must be at least 1, got {self.side_by_side}")

    @property
    def method(self) -> str:
        """Return what is recorded: "exact"."""
        return "exact"

    @property
    def exact_share(self) -> float:
        """Return 1: every pair is measured by itself."""
        return 1.0

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return nothing: no setting changes what is measured."""
        return {}

    def table(self, question: Question, work: Work = QUIETLY) -> Sensitivities:
        """Measure every channel at every width."""
        shapes = layer_shapes(traced_layers(question.policy))
        measured = self.of_pairs(question, all_pairs(shapes, question.widths), work)
        values = {}
        start = 0
        for name, (channels, _) in shapes.items():
            block = measured[start : start + len(question.widths) * channels]
            values[name] = block.reshape(-1, channels).astype(np.float32)
            start += block.size
        return Sensitivities(
            values=values,
            widths=question.widths,
            weights_per_channel={name: inputs for name, (_, inputs) in shapes.items()},
            method=self.method,
            samples=len(question.observations),
            probes=0,
            policy_digest=question.policy.digest,
            calibration_digest=question.calibration_digest,
            quantizer=question.quantizer,
            settings=question.stated_shares,
        )

    def of_pairs(
        self, question: Question, pairs: Sequence[ChannelWidth], work: Work = QUIETLY
    ) -> NDArray[np.float64]:
        """Measure some pairs: mean over observations of ||dA||^2, by shares.  float64 [pairs]

        Every other channel stays in float. Progress counts each pair once a batch.

        Args:
            question: its policy is float32 and left as it is.
            pairs: channels and widths.
            work: a killed measurement that finds its journal goes on from it.

        Raises:
            QvlaError: the policy lacks a layer or channel.
        """
        policy, observations, size = question.policy, question.observations, question.batch_size
        layers = traced_layers(policy)
        _require_pairs(layers, pairs)
        pieces = _pieces(layers, pairs)
        batches = -(-len(observations) // size)
        shares = np.ones(len(observations)) if question.shares is None else question.shares
        changed = changed_rows(layers, pairs, question)
        empty = {"pairs": np.zeros(len(pairs))}
        sums = ShardedSums(empty, _identity(question, pairs), work.progress_file, work.world)
        units = range(batches * len(pieces))
        mine = sums.share(units)
        for batch in range(batches):
            todo = [unit for unit in mine if unit // len(pieces) == batch]
            if not todo:
                continue
            own = slice(batch * size, (batch + 1) * size)
            inputs = batch_in_float64(policy.batch(observations[own]))
            with in_float64(policy), recorded(policy, layers, inputs) as forward:
                for unit in todo:
                    for chunk in _chunks(pairs, pieces[unit % len(pieces)], self.side_by_side):
                        rows = torch.stack([changed[i] for i in chunk]).to(forward.reference)
                        channels = [pairs[i].channel for i in chunk]
                        found = forward.deviations(pairs[chunk[0]].layer, channels, rows)
                        sums.values["pairs"][chunk] += found.cpu().numpy() @ shares[own]
                    sums.mark(unit)
                    if work.on_progress is not None:
                        whole = len(pairs) * batches
                        work.on_progress(min(whole, sums.done(units) * _UNIT_PAIRS), whole)
        return sums.total()["pairs"] / len(observations)


def _pieces(layers: Layers, pairs: Sequence[ChannelWidth]) -> list[list[int]]:
    """Return the indices of pairs by layer, so that channels of one layer meet, cut into units."""
    place = {name: i for i, name in enumerate(layers)}
    order = sorted(range(len(pairs)), key=lambda i: place[pairs[i].layer])
    return [order[i : i + _UNIT_PAIRS] for i in range(0, len(order), _UNIT_PAIRS)]


def _identity(question: Question, pairs: Sequence[ChannelWidth]) -> dict[str, Any]:
    """Return what must be equal for saved sums to be of the same measurement."""
    return {
        "exact": _digest(pairs),
        "policy_digest": question.policy.digest,
        "calibration_digest": question.calibration_digest,
        "observations": [len(question.observations), question.batch_size],
        "quantizer": question.quantizer.to_json(),
        "moments": None if question.moments is None else question.moments.digest,
    }


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


def changed_rows(
    layers: Layers, pairs: Sequence[ChannelWidth], question: Question
) -> list[torch.Tensor]:
    """Return what quantization adds to each pair's row.  float32 [inputs] each"""
    by_layer: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_layer.setdefault(pair.layer, []).append(number)
    found = [torch.zeros(0)] * len(pairs)
    for name, numbers in by_layer.items():
        widths = tuple(sorted({pairs[i].bits for i in numbers}))
        errors = weight_errors(name, layers[name], widths, question.quantizer, question.moments)
        rows = torch.from_numpy(weight_rows(layers[name]))
        for i in numbers:
            channel, bits = pairs[i].channel, pairs[i].bits
            found[i] = errors[bits][channel].cpu() if bits else -rows[channel]
    return found

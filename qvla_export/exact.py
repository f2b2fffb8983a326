"""Exact sensitivities (eq. 4): quantize one channel, run forward, measure the action deviation.

A run reuses whatever one changed channel cannot change: a layer whose input equals the reference's
returns the recorded output, and the changed layer only adds its one channel's difference. Weights
are never touched.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.errors import QvlaError
from qvla_export.layers import apply_rows, as_tokens, layer_shapes, traced_layers, weight_rows
from qvla_export.observation import Observation
from qvla_export.policies.base import Policy
from qvla_export.quantize import QuantizerSpec, quantize_channels
from qvla_export.sensitivity import Sensitivities

METHOD = "exact"

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
    on_progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """Return mean over observations of ||dA||^2 for each pair.  float64 [pairs]

    Args:
        policy: float32; left as it is.
        observations: at least one.
        pairs: channels and widths; every other channel stays in float.
        quantizer: as in the plan.
        batch_size: observations that run together.
        on_progress: called with (runs done, runs in all).

    Raises:
        QvlaError: no observations, or a layer or channel that the policy lacks.
    """
    if not observations:
        raise QvlaError("exact sensitivities need at least one observation, got none")
    layers = traced_layers(policy)
    changes = _changed_rows(layers, pairs, quantizer)
    sums = np.zeros(len(pairs))
    batches = [observations[i : i + batch_size] for i in range(0, len(observations), batch_size)]
    done = 0
    for batch in batches:
        inputs = policy.batch(batch)
        with torch.no_grad(), _reusing(layers) as reuse:
            reference = policy.normalized_actions(inputs)
            for i, pair in enumerate(pairs):
                with reuse.change(pair.layer, pair.channel, changes[i]):
                    deviation = policy.normalized_actions(inputs) - reference
                sums[i] += float(deviation.double().square().sum())
                done += 1
                if on_progress is not None:
                    on_progress(done, len(pairs) * len(batches))
    return sums / len(observations)


def measure_all_exact(
    policy: Policy,
    observations: Sequence[Observation],
    calibration_digest: str,
    quantizer: QuantizerSpec,
    widths: tuple[int, ...] = (0, 2, 4, 8),
    batch_size: int = 8,
) -> Sensitivities:
    """Measure every channel at every width exactly; for small policies and baselines."""
    shapes = layer_shapes(traced_layers(policy))
    pairs = all_pairs(shapes, widths)
    measured = measure_exact(policy, observations, pairs, quantizer, batch_size)
    values = {}
    start = 0
    for name, (channels, _) in shapes.items():
        stop = start + len(widths) * channels
        values[name] = measured[start:stop].reshape(len(widths), channels).astype(np.float32)
        start = stop
    return Sensitivities(
        values=values,
        widths=widths,
        weights_per_channel={name: inputs for name, (_, inputs) in shapes.items()},
        method=METHOD,
        samples=len(observations),
        probes=0,
        policy_digest=policy.digest,
        calibration_digest=calibration_digest,
        quantizer=quantizer,
    )


def all_pairs(shapes: Mapping[str, tuple[int, int]], widths: Sequence[int]) -> list[ChannelWidth]:
    """Return every channel at every width: by layer, then width, then channel."""
    return [
        ChannelWidth(name, channel, bits)
        for name, (channels, _) in shapes.items()
        for bits in widths
        for channel in range(channels)
    ]


def _changed_rows(
    layers: Layers, pairs: Sequence[ChannelWidth], quantizer: QuantizerSpec
) -> list[Tensor]:
    """What quantization adds to each pair's row.  float32 [1, inputs] each"""
    rows: dict[str, NDArray[np.float32]] = {}
    changes = []
    for pair in pairs:
        if pair.layer not in layers or not 0 <= pair.channel < len(layers[pair.layer].weight):
            raise QvlaError(f"the policy has no channel {pair.channel} of layer {pair.layer!r}")
        if pair.layer not in rows:
            rows[pair.layer] = weight_rows(layers[pair.layer])
        row = rows[pair.layer][pair.channel : pair.channel + 1]
        change = quantize_channels(row, pair.bits, quantizer).dequantize() - row
        changes.append(torch.from_numpy(change).to(layers[pair.layer].weight.device))
    return changes


class _Reuse:
    """Forward functions that record the first pass and then compute only what changed."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._changed: tuple[str, int, Tensor] | None = None
        # Layer name -> input and output of the reference pass.
        self._recorded: dict[str, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def change(self, layer: str, channel: int, rows: Tensor) -> Iterator[None]:
        """Run the block with one channel changed."""
        self._changed = (layer, channel, rows)
        try:
            yield
        finally:
            self._changed = None

    def forward(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return what stands in for a layer's forward."""
        layer = self._layers[name]
        original = layer.forward

        def run(inputs: Tensor) -> Tensor:
            if self._changed is None:
                if name in self._recorded:
                    raise QvlaError(f"layer {name} runs more than once in a pass; not supported")
                self._recorded[name] = (inputs, original(inputs))
                return self._recorded[name][1]
            known_inputs, known_outputs = self._recorded[name]
            outputs = known_outputs if torch.equal(inputs, known_inputs) else original(inputs)
            if self._changed[0] != name:
                return outputs
            _, channel, rows = self._changed
            outputs = outputs.clone(memory_format=torch.contiguous_format)
            as_tokens(layer, outputs)[..., channel] += apply_rows(layer, inputs, rows)[..., 0]
            return outputs

        return run


@contextlib.contextmanager
def _reusing(layers: Layers) -> Iterator[_Reuse]:
    reuse = _Reuse(layers)
    replaced: list[Any] = []
    try:
        for name, layer in layers.items():
            stand_in = reuse.forward(name)
            layer.forward = stand_in  # type: ignore[method-assign,assignment]
            replaced.append(layer)
        yield reuse
    finally:
        for layer in replaced:
            del layer.forward  # the class's own forward shows again

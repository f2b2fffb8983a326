"""Uniform widths by the action's own moments, re-implemented or simulated: no library makes them.

`fisher`: nearest codes at the scales of the least error that the action feels, to first order and
input by input, as ActQuant's Fisher weights are used (arXiv 2605.24011). `sign`: a width of 1 bit
that no engine here has: signs, a scale a group, and the compensation of planned codes.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qvla_export.baselines.baseline import BaselineLayer
from qvla_export.baselines.methods import BaselineRequest
from qvla_export.baselines.quantized import Calibration, Quantized
from qvla_export.measurement.measure_moments import measure_moments
from qvla_export.measurement.moment_bounds import DEFAULT_MOMENTS
from qvla_export.policies.layers import traced_layers, weight_rows
from qvla_export.quantizer.arrays import NumpyArrays
from qvla_export.quantizer.compensation import CHANNEL_DAMPING
from qvla_export.quantizer.elimination import Elimination, Levels, eliminate
from qvla_export.quantizer.layer_work import INPUT_DAMPING, LayerInputs, add_to_diagonal, damping_of
from qvla_export.quantizer.moments import LayerMoments
from qvla_export.quantizer.quantize import QuantizerSpec
from qvla_export.quantizer.quantized_weight import QuantizedWeight
from qvla_export.quantizer.scale_search import in_groups, storable_scales

# Scales to try, as shares of the one at which the largest weight is the largest code.
_TRIED = np.linspace(1.1, 0.25, 35)
_COMPENSATED = QuantizerSpec({}, weighted_scales=True, compensation="inputs and channels")


def quantize(calibration: Calibration) -> Quantized:
    """Quantize all layers to the request's width."""
    policy, request = calibration.policy, calibration.request
    settings = replace(DEFAULT_MOMENTS, seed=request.seed)
    moments = measure_moments(policy, calibration.observations, "", settings)
    layers, make = traced_layers(policy), _signs if request.method == "sign" else _nearest
    found = {}
    for number, (name, layer) in enumerate(layers.items(), 1):
        rows = weight_rows(layer)
        found[name] = BaselineLayer(make(rows, moments.of(name, rows.shape), request))
        calibration.on_progress(number, len(layers))
    stated = {"probes": settings.probes, "channels answer each other": request.method == "sign"}
    return Quantized(found, settings=stated)


def _nearest(
    rows: NDArray[np.float32], moments: LayerMoments, request: BaselineRequest
) -> QuantizedWeight:
    """Return the nearest codes at the scales of the least weighted error."""
    largest = 2 ** (request.bits - 1)
    every = np.arange(rows.shape[1])
    diagonal = moments.input_diagonal(every)
    weights = (diagonal + damping_of(diagonal, INPUT_DAMPING)).astype(np.float32)
    groups = in_groups(rows, request.group_size)
    importance = in_groups(weights[None], request.group_size)
    peaks = np.maximum(np.abs(groups).max(axis=2), np.float32(1e-12))
    least = np.full(peaks.shape, np.inf)
    scales, codes = np.ones_like(peaks), np.zeros_like(groups)
    for share in _TRIED:
        tried = storable_scales(
            (peaks * share / max(largest - 1, 1)).astype(np.float32), request.scale_bits
        )
        rounded = np.clip(np.rint(groups / tried[:, :, None]), -largest, largest - 1)
        errors = (importance * np.square(rounded * tried[:, :, None] - groups)).sum(axis=2)
        better = errors < least
        least = np.where(better, errors, least)
        scales = np.where(better, tried, scales)
        codes = np.where(better[:, :, None], rounded, codes)
    flat = codes.reshape(len(rows), -1)[:, : rows.shape[1]].astype(np.int8)
    return QuantizedWeight(flat, _stored(scales, request), request.bits, request.group_size)


def _signs(
    rows: NDArray[np.float32], moments: LayerMoments, request: BaselineRequest
) -> QuantizedWeight:
    """Return signs that make up for each other, at the scales that fit the weights best."""
    channels, inputs = rows.shape
    elimination, every = Elimination(NumpyArrays()), np.arange(inputs)
    along = LayerInputs.of(moments, every, _COMPENSATED, elimination, channels)
    assert along.order is not None and along.shares is not None and along.importance is not None
    # The scale of the least weighted error, with each weight's own sign.
    groups = in_groups(np.abs(rows), request.group_size)
    weights = in_groups(along.importance[None], request.group_size)
    fitted = (weights * groups).sum(axis=2) / weights.sum(axis=2)
    scales = storable_scales(fitted.astype(np.float32), request.scale_bits)
    spread = np.repeat(scales, request.group_size or inputs, axis=1)[:, :inputs]
    ranked = np.argsort(-moments.channel_diagonal(np.arange(channels)), kind="stable")
    damped = moments.channel_matrix(ranked, along.blocking.dtype)
    diagonal = moments.channel_diagonal(np.arange(channels))
    add_to_diagonal(damped, damping_of(diagonal, CHANNEL_DAMPING))
    units = along.put(spread[ranked][:, along.order].T)
    targets = along.put(rows[ranked][:, along.order].T)
    # Whole numbers -1 and 0 of twice the scale, after one scale is taken off, are the signs.
    whole = eliminate(
        targets - units,
        Levels(2 * units, -1.0, 0.0),
        along.shares,
        along.arrays.factor(damped),
        along.arrays,
        along.blocking,
    )
    codes = np.empty(rows.shape, np.int8)
    codes[np.ix_(ranked, along.order)] = (2 * whole + 1).T
    return QuantizedWeight(codes, _stored(scales, request), 1, request.group_size)


def _stored(
    scales: NDArray[np.float32], request: BaselineRequest
) -> NDArray[np.float16] | NDArray[np.float32]:
    return scales.astype(np.float16) if request.scale_bits == 16 else scales

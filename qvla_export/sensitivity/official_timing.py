"""The official procedure's structure, for timing: one calibration pass a layer, one row at a time.

A re-implementation of how QVLA's `sensitivity_hessian_proxy.py` goes about it: for each layer a
hook, the whole model run on every sample by itself, the running mean of the second moment updated
at each call, and every row of the weight quantized alone at every width. What it computes is what
`estimators.hessian` computes in one pass for all layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.layers import traced_layers
from qvla_export.sensitivity.estimators.base import Question
from qvla_export.sensitivity.estimators.hessian import (
    DAMPING,
    input_columns,
    inverse_factor_diagonal,
)

_SMALLEST_PEAK = 1e-6
_SMALLEST_SQUARE = 1e-12


def official_proxies(
    question: Question,
    names: Sequence[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Return the proxy of some layers, one after the other.

    Args:
        question: its quantizer is not used: rows are quantized as officially, by their largest
            weight.
        names: of the layers; None for all.
        on_progress: called with (layers done, layers in all).

    Returns:
        Layer name -> float32 [widths, channels].
    """
    layers = traced_layers(question.policy)
    chosen = list(layers) if names is None else list(names)
    samples = [question.policy.batch([observation]) for observation in question.observations]
    found = {}
    for number, name in enumerate(chosen, 1):
        moment = _second_moment(question, layers[name], samples)
        diagonal = inverse_factor_diagonal(moment, DAMPING)
        found[name] = _proxies(layers[name], diagonal, question.widths)
        if on_progress is not None:
            on_progress(number, len(chosen))
    return found


def _second_moment(
    question: Question, layer: nn.Linear | nn.Conv2d, samples: Sequence[PolicyBatch]
) -> Tensor:
    """Run every sample through the whole policy for this one layer.  float32 [inputs, inputs]"""
    inputs = layer.weight[0].numel()
    kept: dict[str, Any] = {"moment": torch.zeros(inputs, inputs), "count": 0}

    def update(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        fed: Tensor = arguments[0]
        more = 1 if fed.ndim == 2 else fed.shape[0]
        kept["moment"] *= kept["count"] / (kept["count"] + more)
        kept["count"] += more
        columns = (2.0 / kept["count"]) ** 0.5 * input_columns(layer, fed).float()
        kept["moment"] += columns.T @ columns

    handle = layer.register_forward_hook(update)
    try:
        with torch.no_grad():
            for sample in samples:
                question.policy.normalized_actions(sample)
    finally:
        handle.remove()
    moment: Tensor = kept["moment"]
    return moment


def _proxies(layer: nn.Linear | nn.Conv2d, diagonal: Tensor, widths: Sequence[int]) -> Tensor:
    rows = layer.weight.detach().flatten(1).float()
    squares = diagonal.square().clamp_min(_SMALLEST_SQUARE)
    proxies = []
    for bits in widths:
        quantized = torch.stack([_quantized_row(row, bits) for row in rows])
        proxies.append(((rows - quantized).square() / squares).sum(dim=1))
    return torch.stack(proxies)


def _quantized_row(row: Tensor, bits: int) -> Tensor:
    if bits == 0:
        return torch.zeros_like(row)
    most = (1 << (bits - 1)) - 1
    scale = row.abs().max().clamp_min(_SMALLEST_PEAK) / most
    return torch.round(row / scale).clamp_(-most - 1, most) * scale

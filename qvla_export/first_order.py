"""Sensitivities of all channels and widths to first order, one backward pass a probe.

Quantizing channel c of a layer changes its output at token t by E[t, c] = x_t . dW_c, and the
normalized action by dA = sum_t J[t, c] E[t, c] to first order. For a probe v over the action's
numbers, one backward pass gives g = d(v . A)/dY, hence v . dA = sum_t g[t, c] E[t, c] for every
channel at once; random signs v give E_v[(v . dA)^2] = ||dA||^2, and so does the sum over all unit
vectors. Neither the norm product of eq. 6 nor the isotropic noise of appendix G is assumed.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.artifacts import write_bytes
from qvla_export.errors import QvlaError
from qvla_export.layers import apply_rows, as_tokens, error_rows, layer_shapes, traced_layers
from qvla_export.observation import Observation
from qvla_export.policies.base import Policy
from qvla_export.quantize import QuantizerSpec
from qvla_export.sensitivity import Sensitivities, read_tensor_file, tensor_file

METHOD = "first order, full"
_PROGRESS_FORMAT = "qvla-first-order-progress-1"
_log = logging.getLogger(__name__)

Layers = Mapping[str, nn.Linear | nn.Conv2d]


@dataclass(frozen=True)
class FirstOrder:
    """How to measure to first order.

    `probes` random signs an observation leave the estimate unbiased with a relative standard error
    of at most sqrt(2 / probes), and sqrt(2 / (probes * observations)) where observations are alike.
    None takes every number of the action chunk in turn: no such error, cheap for small chunks.
    """

    quantizer: QuantizerSpec
    widths: tuple[int, ...] = (0, 2, 4, 8)
    probes: int | None = None
    seed: int = 0
    # Observations that run together; memory grows with it.
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.probes is not None and self.probes < 1):
            raise QvlaError(
                f"batch_size and probes must be at least 1, got {self.batch_size}, {self.probes}"
            )


@dataclass
class _Sums:
    """Sums over the batches done so far; additive, so they can be saved, resumed, all-reduced."""

    # Layer name -> sum over observations.  float64 [widths, channels]
    values: dict[str, NDArray[np.float64]]
    batches: int


def measure_first_order(
    policy: Policy,
    observations: Sequence[Observation],
    calibration_digest: str,
    settings: FirstOrder,
    progress_file: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Sensitivities:
    """Estimate the sensitivity of every channel at every width.

    Args:
        policy: its weights stay as they are.
        observations: at least one.
        calibration_digest: digest of the set they came from.
        settings: quantizer, widths, probes, seed, batch size.
        progress_file: sums are saved here after each batch; a killed run that finds the file goes
            on from it and gives the same numbers. The caller removes it when the result is safe.
        on_progress: called with (observations done, observations in all) after each batch.

    Raises:
        QvlaError: no observations, or a layer that is called more than once in a pass.
        ArtifactError: the progress file is damaged.
    """
    if not observations:
        raise QvlaError("sensitivities need at least one observation, got none")
    layers = traced_layers(policy)
    errors = {name: _stacked_errors(layer, settings) for name, layer in layers.items()}
    identity = _identity(policy, observations, calibration_digest, settings)
    sums = _resumed(progress_file, identity) or _no_sums(layers, settings)
    size = settings.batch_size
    for start in range(sums.batches * size, len(observations), size):
        _add_batch(policy, layers, errors, observations[start : start + size], settings, sums)
        if progress_file is not None:
            provenance = {"format": _PROGRESS_FORMAT, "of": identity, "batches": sums.batches}
            write_bytes(progress_file, tensor_file(sums.values, provenance))
        if on_progress is not None:
            on_progress(min(start + size, len(observations)), len(observations))
    values = {n: (sums.values[n] / len(observations)).astype(np.float32) for n in layers}
    return Sensitivities(
        values=values,
        widths=settings.widths,
        weights_per_channel={name: n for name, (_, n) in layer_shapes(layers).items()},
        method=METHOD,
        samples=len(observations),
        probes=settings.probes or 0,
        seed=settings.seed,
        policy_digest=policy.digest,
        calibration_digest=calibration_digest,
        quantizer=settings.quantizer,
    )


def _no_sums(layers: Layers, settings: FirstOrder) -> _Sums:
    rows = len(settings.widths)
    return _Sums({name: np.zeros((rows, len(x.weight))) for name, x in layers.items()}, 0)


def _stacked_errors(layer: nn.Linear | nn.Conv2d, settings: FirstOrder) -> Tensor:
    """Weight errors of all widths, one below the other.  float32 [widths * channels, inputs]"""
    rows = [error_rows(layer, bits, settings.quantizer) for bits in settings.widths]
    return torch.from_numpy(np.concatenate(rows)).to(layer.weight.device)


def _add_batch(
    policy: Policy,
    layers: Layers,
    errors: Mapping[str, Tensor],
    observations: Sequence[Observation],
    settings: FirstOrder,
    sums: _Sums,
) -> None:
    """Add sum over samples and probes of (sum_t g[t, c] E[t, c])^2 to the sums."""
    actions, inputs, outputs = _recorded_pass(policy, layers, observations)
    flat = actions.reshape(len(observations), -1)
    changes = {}
    with torch.no_grad():
        for name, layer in layers.items():
            mapped = apply_rows(layer, inputs[name], errors[name])
            changes[name] = mapped.reshape(*mapped.shape[:2], len(settings.widths), -1)
    probes, weight = _probes(flat, settings, sums.batches)
    targets = [outputs[name] for name in layers]
    for number, probe in enumerate(probes):
        gradients = torch.autograd.grad(
            flat, targets, grad_outputs=probe, retain_graph=number + 1 < len(probes)
        )
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            tokens = as_tokens(layer, gradient)
            # v . dA of each image; a sample's images add up before squaring.
            moved = torch.einsum("ntc,ntwc->nwc", tokens, changes[name])
            moved = moved.reshape(len(observations), -1, *moved.shape[1:]).sum(dim=1)
            squared = moved.double().square().sum(dim=0)
            sums.values[name] += weight * squared.cpu().numpy()
    sums.batches += 1


def _recorded_pass(
    policy: Policy, layers: Layers, observations: Sequence[Observation]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Run forward with a graph; return the actions and each layer's inputs and outputs."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if name in outputs:
                raise QvlaError(f"layer {name} runs more than once in a pass; not supported")
            # All parameters are frozen, so the graph has to begin at the first layers' outputs.
            if not output.requires_grad:
                output.requires_grad_(True)
            inputs[name] = arguments[0].detach()
            outputs[name] = output

        return record

    handles = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            actions = policy.normalized_actions(policy.batch(observations))
    finally:
        for handle in handles:
            handle.remove()
    return actions, inputs, outputs


def _probes(flat: Tensor, settings: FirstOrder, batch: int) -> tuple[list[Tensor], float]:
    """Probes [B, outputs] of a batch and the weight of each: unit vectors or random signs."""
    if settings.probes is None:
        identity = torch.eye(flat.shape[1], device=flat.device)
        return [row.expand_as(flat) for row in identity], 1.0
    # Seeded by the batch's number, so that a resumed run draws the same signs.
    generator = np.random.default_rng([settings.seed, batch])
    signs = generator.integers(0, 2, (settings.probes, *flat.shape), dtype=np.int8) * 2.0 - 1.0
    return list(torch.from_numpy(signs).to(flat)), 1.0 / settings.probes


def _identity(
    policy: Policy,
    observations: Sequence[Observation],
    calibration_digest: str,
    settings: FirstOrder,
) -> dict[str, Any]:
    """What must be equal for saved sums to be of the same measurement."""
    return {
        "policy_digest": policy.digest,
        "calibration_digest": calibration_digest,
        "observations": len(observations),
        "settings": {**asdict(settings), "quantizer": settings.quantizer.to_json()},
    }


def _resumed(progress_file: Path | None, identity: Mapping[str, Any]) -> _Sums | None:
    """Return the saved sums of this very measurement, if there are any."""
    if progress_file is None or not progress_file.is_file():
        return None
    tensors, saved = read_tensor_file(progress_file, _PROGRESS_FORMAT, "sensitivity progress")
    if saved["of"] != json.loads(json.dumps(identity)):
        _log.warning("%s is of another measurement; starting anew", progress_file)
        return None
    return _Sums(dict(tensors), saved["batches"])

"""Measure what smoothing needs and brings: inputs' maxima, the error of a smoothed policy."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qvla_export.measurement.measure_activations import measure_activations
from qvla_export.policies.base import Policy, PolicyBatch
from qvla_export.policies.layers import fake_quantized, layer_shapes, traced_layers
from qvla_export.policies.smoothing import Migration, smoothed_tensors
from qvla_export.quantizer.activations import DEFAULT_METHOD
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import Target


def input_maxima(
    policy: Policy,
    observations: Sequence[Observation],
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Return the largest |x| of every element of the linear layers' inputs.

    Returns:
        layer name -> float32 [inputs]; convolutions have none.

    Raises:
        QvlaError: no observations, or an input that is not finite.
    """
    if not observations:
        raise QvlaError("smoothing needs at least one observation, got none")
    largest: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            sizes = arguments[0].detach().abs().flatten(0, -2).amax(dim=0).float().cpu()
            if not bool(torch.isfinite(sizes).all()):
                raise QvlaError(f"layer {name} is fed NaN or infinity; the policy is broken")
            largest[name] = torch.maximum(largest.get(name, sizes), sizes)

        return record

    linear = {n: m for n, m in traced_layers(policy).items() if isinstance(m, nn.Linear)}
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in linear.items()]
    try:
        with torch.no_grad():
            for number, observation in enumerate(observations, 1):
                # A policy that decodes feeds its layers the same numbers while it chooses tokens.
                policy.normalized_actions(policy.batch([observation]))
                if on_progress is not None:
                    on_progress(number, len(observations))
    finally:
        for handle in handles:
            handle.remove()
    return largest


@contextlib.contextmanager
def smoothed(module: nn.Module, factors: Mapping[Migration, Tensor]) -> Iterator[None]:
    """Run the block with the network smoothed; its numbers return bit for bit."""
    tensors = smoothed_tensors(module, factors)
    kept = {name: module.get_parameter(name).detach().clone() for name in tensors}
    try:
        with torch.no_grad():
            for name, factor in tensors.items():
                module.get_parameter(name).mul_(factor)
        yield
    finally:
        with torch.no_grad():
            for name, values in kept.items():
                module.get_parameter(name).copy_(values)


def smoothing_error(
    policy: Policy,
    factors: Mapping[Migration, Tensor],
    observations: Sequence[Observation],
    calibration_digest: str,
    target: Target,
) -> float:
    """Return the RMS action error of uniform 8-bit weights and activations, smoothed.

    Args:
        policy: as it was.
        factors: to smooth it with; empty for not at all.
        observations: to take the activations' ranges from, and to measure on.
        calibration_digest: digest of the set they came from.
        target: gives the weights' containers and scales.
    """
    plan = uniform_plan(layer_shapes(traced_layers(policy)), 8, target, policy.digest)
    batches = [policy.batch([observation]) for observation in observations]
    wanted = _actions(policy, batches)
    with smoothed(policy.module, factors):
        fed = measure_activations(policy, observations, calibration_digest)
        ranges = fed.ranges(8, DEFAULT_METHOD)
        rounded = replace(plan, activations=ranges, calibration_digest=calibration_digest)
        with fake_quantized(policy, rounded):
            found = _actions(policy, batches)
    return float((found - wanted).square().mean().sqrt())


def _actions(policy: Policy, batches: Sequence[PolicyBatch]) -> Tensor:
    with torch.no_grad():
        return torch.cat([policy.normalized_actions(batch) for batch in batches])

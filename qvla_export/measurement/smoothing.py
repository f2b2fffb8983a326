"""Move the size of outliers from a layer's inputs into its weights (SmoothQuant, ICML 2023).

An input is divided, element by element, by factors that the norm or the linear map before it takes
over; the layer's columns are multiplied by them. In float nothing changes but rounding; rounded to
8 or 4 bits, an input without outliers loses less.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qvla_export.measurement.measure_activations import measure_activations
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import fake_quantized, layer_shapes, traced_layers
from qvla_export.quantizer.activations import DEFAULT_METHOD
from qvla_export.quantizer.plan import uniform_plan
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import Target

# An element that is always zero has no size to move.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Migration:
    """Where an input's factors go."""

    # Module whose output is divided: a norm, or a linear map whose rows are the input's elements.
    source: str
    # Layers that take the input, and nothing else does.
    consumers: tuple[str, ...]


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
                policy.normalized_actions(policy.batch([observation]))
                if on_progress is not None:
                    on_progress(number, len(observations))
    finally:
        for handle in handles:
            handle.remove()
    return largest


def smoothing_factors(
    module: nn.Module,
    migrations: Sequence[Migration],
    maxima: Mapping[str, Tensor],
    strength: float,
    powers_of_two: bool = False,
) -> dict[Migration, Tensor]:
    """Return what each migration's input is divided by: max|x|^strength / max|w|^(1 - strength).

    Factors of an input have the geometric mean 1, so that no tensor grows as a whole.

    Args:
        module: the policy's network.
        migrations: those whose consumers have no maxima are left out.
        maxima: of `input_maxima`.
        strength: 0 moves everything to the inputs, 1 to the weights.
        powers_of_two: round the factors so that no number stored in any float type is rounded.

    Returns:
        migration -> float32 [inputs].

    Raises:
        QvlaError: a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise QvlaError(f"the strength of smoothing is in [0, 1], got {strength}")
    factors = {}
    for migration in migrations:
        if not any(name in maxima for name in migration.consumers):
            continue
        inputs = torch.stack([maxima[n] for n in migration.consumers if n in maxima]).amax(dim=0)
        weights = torch.stack(
            [_weight(module, name).abs().amax(dim=0) for name in migration.consumers]
        ).amax(dim=0)
        logs = strength * inputs.clamp(min=_SMALLEST).log2()
        logs = logs - (1 - strength) * weights.float().cpu().clamp(min=_SMALLEST).log2()
        logs = logs - logs.mean()
        factors[migration] = torch.exp2(logs.round() if powers_of_two else logs)
    return factors


def smoothed_tensors(module: nn.Module, factors: Mapping[Migration, Tensor]) -> dict[str, Tensor]:
    """Return what the network's parameters are multiplied by, shaped to broadcast.

    A module may be the source of one migration and a consumer of another.
    """
    found: dict[str, Tensor] = {}

    def multiply(name: str, factor: Tensor) -> None:
        found[name] = found[name] * factor if name in found else factor

    for migration, factor in factors.items():
        source = module.get_submodule(migration.source)
        rows = (len(factor),) + (1,) * (_weight(module, migration.source).ndim - 1)
        multiply(f"{migration.source}.weight", (1 / factor).reshape(rows))
        if getattr(source, "bias", None) is not None:
            multiply(f"{migration.source}.bias", 1 / factor)
        for name in migration.consumers:
            multiply(f"{name}.weight", factor)
    return found


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
    wanted = _actions(policy, observations)
    with smoothed(policy.module, factors):
        fed = measure_activations(policy, observations, calibration_digest)
        ranges = fed.ranges(8, DEFAULT_METHOD)
        rounded = replace(plan, activations=ranges, calibration_digest=calibration_digest)
        with fake_quantized(policy, rounded):
            found = _actions(policy, observations)
    return float((found - wanted).square().mean().sqrt())


def _actions(policy: Policy, observations: Sequence[Observation]) -> Tensor:
    with torch.no_grad():
        return torch.cat([policy.normalized_actions(policy.batch([o])) for o in observations])


def _weight(module: nn.Module, name: str) -> Tensor:
    weight: Tensor = module.get_submodule(name).get_parameter("weight").detach()
    return weight

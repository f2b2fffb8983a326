"""Move the size of outliers from a layer's inputs into its weights (SmoothQuant, ICML 2023).

An input is divided, element by element, by factors that the norm or the linear map before it takes
over; the layer's columns are multiplied by them. In float nothing changes but rounding; rounded to
8 or 4 bits, an input without outliers loses less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvla_export.shared.errors import QvlaError

# An element that is always zero has no size to move.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Migration:
    """Where an input's factors go."""

    # Module whose output is divided: a norm, or a linear map whose rows are the input's elements.
    source: str
    # Layers that take the input, and nothing else does.
    consumers: tuple[str, ...]


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


def _weight(module: nn.Module, name: str) -> Tensor:
    weight: Tensor = module.get_submodule(name).get_parameter("weight").detach()
    return weight

"""Memory of steps that read a policy part by part: by the plan of work that these steps make."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvla_export.pipeline.deploy import Deployment
    from qvla_export.policies.base import Policy
    from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class StreamedMemory:
    """Bytes at the peak, beside what the process has in memory before."""

    sensitivities: int
    # 0 where codes are the nearest.
    rounding: int


def streamed_memory(
    request: "Deployment", policy: "Policy", observation: "Observation", count: int
) -> StreamedMemory:
    """Plan a deployment's sensitivities and rounding as they will be, and return what is counted.

    Args:
        request: as `deploy` takes it; its policy is read part by part.
        policy: its weights were left on disk.
        observation: of the longest prompt.
        count: observations to measure on.

    Raises:
        QvlaError: what is needed exceeds the bound.
    """
    import torch

    from engines.targets import find_target
    from qvla_export.measurement.moment_bounds import MomentSettings
    from qvla_export.measurement.round_spans import rounding_sweeps
    from qvla_export.quantizer.quantize import compensated_spec, spec_for
    from qvla_export.sensitivity.estimators.first_order import FirstOrder, open_first_order

    held, target = request.holding, find_target(request.target, request.zero_points, request.scales)
    compensated = request.quantizer == "compensated"
    observations, device = [observation] * count, torch.device(held.device)
    how = FirstOrder(
        compensated_spec(target) if compensated else spec_for(target),
        probes=request.probes,
        batch_size=held.batch_size,
        max_bytes=held.max_bytes,
        span_moments=MomentSettings() if compensated else None,
    )
    stream, _ = open_first_order(policy, observations, how, device)
    rounding = 0
    if compensated:
        moments = MomentSettings(batch_size=held.batch_size, max_bytes=held.max_bytes)
        rounding = rounding_sweeps(policy, observations, moments, device).stream.peak_bytes
    return StreamedMemory(stream.peak_bytes, rounding)

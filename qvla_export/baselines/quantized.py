"""What a library's adapter is given and returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qvla_export.baselines.baseline import BaselineLayer
from qvla_export.baselines.methods import BaselineRequest
from qvla_export.policies.base import Policy
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.shared.observation import Observation

# Called with (parts done, parts in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What a library may use: the policy, which it changes, and observations to calibrate on."""

    policy: Policy
    observations: Sequence[Observation]
    request: BaselineRequest
    on_progress: Progress

    def run(self) -> None:
        """Run all observations through the policy, without padding."""
        from qvla_export.baselines.layer_adapter import even_batches

        with torch.no_grad():
            for batch in even_batches(self.policy, self.observations):
                self.policy.normalized_actions(batch)


@dataclass(frozen=True)
class Quantized:
    """What a library made."""

    layers: Mapping[str, BaselineLayer]
    # How inputs are rounded; None for not at all.
    activations: ActivationRanges | None = None
    # The library's settings, in its words.
    settings: Mapping[str, Any] = field(default_factory=dict)

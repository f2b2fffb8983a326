"""The noun `WeightPlacement`: where a policy computes, and the type its weights have there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qvla_export.measurement.raised_weights import (
    raise_by_unit,
    raised_by_unit,
    weights_of_units,
)
from qvla_export.policies.base import Policy


@dataclass(frozen=True)
class WeightPlacement:
    """A device, and whether weights stay as they are stored there."""

    device: torch.device
    # Raised to float32 unit by unit, see `raised_weights`; else float32 throughout.
    keeps_stored: bool

    @classmethod
    def on(cls, device: torch.device) -> "WeightPlacement":
        """Return how weights lie on a device: as stored wherever it is no CPU.

        A CPU would raise the same weights at each pass, and has the memory more often.
        """
        return cls(device, device.type != "cpu")

    def resident(self, stored: Policy) -> Policy:
        """Return a policy, whose weights were left on disk, with its weights on the device."""
        if self.keeps_stored:
            policy = stored.as_stored(self.device, weights_of_units(stored.module))
            raise_by_unit(policy.module)
            return policy
        policy = stored.in_memory()
        policy.module.to(self.device)
        return policy

    def reader(self, policy: Policy) -> Callable[[str], Tensor]:
        """Return what reads a weight of a policy into host memory, in the type it has there."""
        stored = weights_of_units(policy.module) if self.keeps_stored else frozenset()

        def read(name: str) -> Tensor:
            if name in stored:
                return policy.stored_weight(name)
            return torch.from_numpy(np.ascontiguousarray(policy.read_weight(name)))

        return read

    @contextmanager
    def computing(self, policy: Policy) -> Iterator[None]:
        """Let a policy's network compute in float32 while the block runs."""
        with raised_by_unit(policy.module) if self.keeps_stored else nullcontext():
            yield

"""Actions a policy returns, and the one interface every policy object offers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class ActionChunk:
    """The next actions of a policy and the time each span of computing them took."""

    # Actions in the robot's units.  float32 [horizon, dim]
    actions: NDArray[np.float32]
    # The same before un-normalization.  float32 [horizon, dim]
    normalized: NDArray[np.float32]
    # Stage name -> milliseconds.
    timing_ms: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        horizon, dim = self.actions.shape
        whole = {name: ms for name, ms in self.timing_ms.items() if "." not in name}
        total_ms = whole.pop("total", sum(whole.values()))
        return f"<ActionChunk: {horizon} actions of {dim} dimensions, {total_ms:.1f} ms>"


class ActionPolicy(Protocol):
    """Anything that acts: a torch policy, an engine, a remote server."""

    def infer(self, observation: Observation) -> ActionChunk:
        """Return the next actions for one observation."""
        ...

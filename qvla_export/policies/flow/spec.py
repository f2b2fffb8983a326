"""The noun `FlowSpec`: the steps of a flow's Euler integration and how the network sees time."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import CheckpointError

# "accumulated": openpi's sampler adds the step to a float32 time, whose rounding errors add up.
# "computed": LeRobot's computes 1 + i * step anew. The shortest period magnifies the difference in
# the last bits to 1e-3 of a velocity.
Times = Literal["accumulated", "computed"]
_MOST_STEPS = 200
# No time is longer than 1.
_MOST_PERIOD = 1e6


@dataclass(frozen=True)
class FlowSpec:
    """From noise at time 1 to an action at time 0, in equal steps.

    Raises:
        CheckpointError: a number of steps that no policy has, or periods out of order.
    """

    steps: int
    times: Times
    # Of the sine and cosine that stand for a time.
    min_period: float = 4e-3
    max_period: float = 4.0

    def __post_init__(self) -> None:
        if type(self.steps) is not int or not 1 <= self.steps <= _MOST_STEPS:
            raise CheckpointError(
                f"a flow takes 1 to {_MOST_STEPS} steps, got {self.steps!r}; upstream's default is "
                "10"
            )
        periods = (self.min_period, self.max_period)
        numbers = all(type(period) in (int, float) for period in periods)
        if not numbers or not 0 < periods[0] < periods[1] < _MOST_PERIOD:
            raise CheckpointError(
                "min_period and max_period of the time must be numbers above 0, the second the "
                f"larger one, got {self.min_period!r:.80} and {self.max_period!r:.80}"
            )

    @property
    def step(self) -> float:
        """Time that passes in a step; negative, as the flow runs from 1 to 0."""
        return -1.0 / self.steps

    def time_points(self) -> NDArray[np.float32]:
        """Return the time at the beginning of each step.  float32 [steps]"""
        if self.times == "computed":
            return (1.0 + np.arange(self.steps) * self.step).astype(np.float32)
        step, points = np.float32(self.step), [np.float32(1.0)]
        for _ in range(self.steps - 1):
            points.append(points[-1] + step)
        return np.array(points, np.float32)

    def time_table(self, width: int) -> NDArray[np.float32]:
        """Return what stands for the time in each step: sines, then cosines.

        Computed in float64, as upstream does (openpi `create_sinusoidal_pos_embedding`); a graph
        would have to do without.  float32 [steps, width]
        """
        fraction = np.linspace(0.0, 1.0, width // 2)
        period = self.min_period * (self.max_period / self.min_period) ** fraction
        angles = self.time_points().astype(np.float64)[:, None] * (2 * np.pi / period)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

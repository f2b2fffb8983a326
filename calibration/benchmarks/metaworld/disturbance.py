"""What disturbs an expert's actions on their way to the robot."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Disturbance:
    """How an expert's actions are disturbed on the way to the robot; labels stay clean.

    Drifting noise keeps the hand beside the expert's path, kicks throw it far off: the policy
    sees, and learns to leave, states that its own errors will bring it into.
    """

    # Largest standard deviation of the drifting noise; each episode draws its own.
    noise: float = 0.4
    # How much of the noise stays from one control step to the next.
    drift: float = 0.8
    # Chance of a kick at each control step, its least and greatest length in control steps.
    kicks: float = 0.02
    shortest: int = 3
    longest: int = 8

    def begin(self, random: np.random.Generator) -> Callable[[Vector], Vector]:
        """Return the function that disturbs one episode's actions, float32 [4], in order."""
        scale = random.uniform(0.0, self.noise) * np.sqrt(1.0 - self.drift**2)
        noise = np.zeros(3)
        kick = np.zeros(3)
        left = 0

        def disturb(action: Vector) -> Vector:
            nonlocal noise, kick, left
            noise = self.drift * noise + random.normal(0.0, scale, 3)
            if left == 0 and random.random() < self.kicks:
                left = int(random.integers(self.shortest, self.longest + 1))
                kick = random.normal(size=3)
                kick /= np.linalg.norm(kick)
            moved = action.copy()
            moved[:3] = np.clip(kick if left else action[:3] + noise, -1.0, 1.0)
            left = max(0, left - 1)
            return moved

        return disturb

"""The noun `CommandResponse`: how far commands move a robot's state, and how soon.

With it the state in which a chunk will begin is known before the policy has thought of the chunk:
what VLASH (arXiv 2512.01031) calls to roll the state forward. It needs proprioception only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import QvlaError

# At once: what is sent is done when the next command is due.
_PROMPT = np.ones(1)


@dataclass(frozen=True)
class CommandResponse:
    """What each number of an action does to the number of the state at the same place.

    Raises:
        QvlaError: there is no number, one is infinite, or the shares are not finite.
    """

    # What an action of 1 adds to the state's number: of a displacement its unit, of a speed a
    # period's worth; NaN where the action is what the number shall be (a position), 0 where the
    # state's number is another thing.  float64 [n]
    effects: NDArray[np.float64]
    # Shares of a command that are done before the next one is due, before the one after, and so on.
    # float64 [periods]
    shares: NDArray[np.float64] = field(default_factory=_PROMPT.copy)

    def __post_init__(self) -> None:
        effects, shares = self.effects, self.shares
        if effects.ndim != 1 or not effects.size or np.isinf(effects).any():
            raise QvlaError(
                "what an action does to a state is a number for each of its dimensions, NaN for a "
                f"position, got {effects.tolist()}"
            )
        if shares.ndim != 1 or not shares.size or not np.isfinite(shares).all():
            raise QvlaError(
                "a response is the shares of a command that are done in its own period, the next "
                f"and so on, as finite numbers (1: at once), got {shares.tolist()}"
            )

    @property
    def memory(self) -> int:
        """Commands before an observation that still move what it shows, and the one before them."""
        return len(self.shares) + 1

    def moved(
        self, sent: Sequence[NDArray[Any]], committed: Sequence[NDArray[Any]]
    ) -> NDArray[np.float64]:
        """Return what commands will have added to a state when the last of them has had its period.

        Args:
            sent: the commands before the state was seen, `memory` of them if there are as many; the
                last of them are still being followed.  [>= n] each
            committed: the commands that follow.  [>= n] each

        Returns:
            float64 [n]
        """
        size = len(self.effects)
        commands = [command[:size] for command in (*sent[-self.memory :], *committed)]
        if not commands:
            return np.zeros(size)
        numbers = np.asarray(commands, np.float64)
        # A position is reached from the one that was commanded before it.
        steps = np.diff(numbers, axis=0, prepend=numbers[:1])
        displacements = np.where(np.isnan(self.effects), steps, numbers * self.effects)
        periods = np.arange(len(numbers), 0, -1)
        weights = self._done(periods) - self._done(periods - len(committed))
        moved: NDArray[np.float64] = weights @ displacements
        return moved

    def _done(self, periods: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the shares of commands that are done so many periods after they were sent."""
        done = np.append(0.0, np.cumsum(self.shares))
        return done[np.clip(periods, 0, len(self.shares))]

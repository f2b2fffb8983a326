"""A policy whose prompt repeats what it chose at the step before, in a loop that runs one robot."""

from qvla_export.shared.action import ActionChunk, ActionPolicy, following
from qvla_export.shared.observation import Observation


class RememberingPolicy:
    """Hands each chunk's history on to the next observation; an `ActionPolicy`.

    Another instruction begins another episode, without history. One robot's observations at a time.
    """

    def __init__(self, policy: ActionPolicy) -> None:
        self._policy = policy
        self._last: tuple[str, ActionChunk] | None = None

    def infer(self, observation: Observation) -> ActionChunk:
        """Act on one observation, as the one after that of the last call."""
        before = None
        if self._last is not None and self._last[0] == observation.instruction:
            before = self._last[1]
        chunk = self._policy.infer(following(observation, before))
        self._last = observation.instruction, chunk
        return chunk

"""What the policy is shown: what was observed, or with roll-forward where its chunk will begin."""

from dataclasses import replace

import numpy as np

from jetson.control.chunks import ChunkBuffer, SentCommands
from jetson.control.settings import LoopSettings
from jetson.control.sources import TimedObservation
from jetson.control.supervisor import Supervisor
from qvla_export.shared.errors import InvalidObservation


class Foresight:
    """Knows which commands come before a chunk that is asked for now."""

    def __init__(
        self,
        settings: LoopSettings,
        chunks: ChunkBuffer,
        sent: SentCommands,
        supervisor: Supervisor,
    ) -> None:
        # Number of the policy command that the first action of the chunk asked for last will be.
        self.first_command = 0
        self._response = settings.response
        self._chunks = chunks
        self._sent = sent
        self._supervisor = supervisor

    def show(self, seen: TimedObservation, lead: int, now_s: float) -> TimedObservation:
        """Return what to ask the policy about.

        With roll-forward the state is moved by the commands sent since it was observed and those
        that will be sent meanwhile; pictures and the moment of the observation stay.

        Args:
            seen: the newest observation.
            lead: slots that pass until the chunk is there.
            now_s: the loop's clock.

        Raises:
            InvalidObservation: the state has fewer numbers than commands move.
        """
        if self._response is None:
            self.first_command = self._sent.count_before(seen.observed_s)
            return seen
        coming = self._chunks.coming(self._sent.count, lead, now_s)
        self.first_command = self._sent.count + len(coming)
        before, since = self._sent.around(seen.observed_s)
        committed = [*since, *self._supervisor.foresee(coming, lead)]
        moved = self._response.moved(before, committed)
        state = seen.observation.state.astype(np.float64)
        if len(state) < len(moved):
            raise InvalidObservation(
                f"roll-forward moves {len(moved)} numbers of the state, got {len(state)}"
            )
        state[: len(moved)] += moved
        shown = replace(seen.observation, state=state.astype(np.float32))
        return replace(seen, observation=shown)

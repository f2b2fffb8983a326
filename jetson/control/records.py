"""What a run says of itself: a record of every slot, counters, the result, and who keeps them."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from jetson.control.chunks import TimedChunk
from jetson.control.loop_state import LoopState
from jetson.control.sources import TimedObservation
from jetson.recording.new_files import create_recording

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """What happened at one slot."""

    # Slots are numbered from 0; slot k is due k periods after the start.
    slot: int
    # Monotonic seconds.
    due_s: float
    # When the command was sent, monotonic seconds; None where none was.
    sent_s: float | None
    # After the slot.
    state: LoopState
    # The command, in the robot's units; None where none was sent.
    action: tuple[float, ...] | None
    # When the observation behind the command was taken, monotonic seconds; None for a command
    # that holds or ramps.
    observed_s: float | None
    # The chunk and which of its actions; None for a command that holds or ramps.
    chunk: int | None
    step: int | None
    # Values of the policy's action that were cut to a limit.
    clamped: int
    # Milliseconds of the inference whose result arrived at this slot; None where none did.
    infer_ms: float | None
    # What else happened, in words: failures, dropped observations, stale chunks, the stop.
    events: tuple[str, ...] = ()

    @property
    def age_ms(self) -> float | None:
        """Age of the observation behind the command when it was sent."""
        if self.sent_s is None or self.observed_s is None:
            return None
        return (self.sent_s - self.observed_s) * 1000.0

    @property
    def late_ms(self) -> float | None:
        """How long after its slot the command was sent."""
        return None if self.sent_s is None else (self.sent_s - self.due_s) * 1000.0


@dataclass
class Counters:
    """Counts of one run."""

    # Commands that came from the policy.
    sent: int = 0
    # Commands that held, ramped or stopped the robot instead.
    held: int = 0
    # Slots after the first policy command, and before the stop, without a usable action.
    missed_deadlines: int = 0
    # Slots that passed while the loop itself was kept from running.
    skipped_slots: int = 0
    # Observations that were too old to be acted on, or stamped with no time at all.
    dropped_observations: int = 0
    # Commands that the robot's driver did not take because the one before still waited.
    dropped_commands: int = 0
    # Chunks that arrived too late to be used at all.
    stale_chunks: int = 0
    # Values cut to a limit.
    clamped_values: int = 0
    # Failures of the engine, the source, the robot or the recorder.
    faults: int = 0


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    # STOPPED or FAULT.
    state: LoopState
    # Why, in words.
    reason: str
    counters: Mapping[str, int]
    seconds: float
    # Whether the simulated task was solved; None where nobody can say.
    solved: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """Return how the run ended as JSON values."""
        return {**asdict(self), "state": self.state.value, "ok": self.ok}

    @property
    def ok(self) -> bool:
        """Whether it was stopped as asked and nothing failed."""
        return self.state is LoopState.STOPPED and not self.counters["faults"]


class Recorder(Protocol):
    """Keeps a run. Called from the control thread: must not wait.

    One that cannot go on raises once; what it is told afterwards it drops and counts.
    """

    @property
    def failure(self) -> str | None:
        """Why nothing is kept any more; None while it is."""
        ...

    def on_observation(self, observation: TimedObservation) -> None:
        """Take an observation that the policy is asked about."""
        ...

    def on_chunk(self, chunk: TimedChunk) -> None:
        """Take a chunk that came of one."""
        ...

    def on_step(self, record: StepRecord) -> None:
        """Take the record of a slot."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class JsonlRecorder:
    """One JSON object a line and slot, without pictures; what a killed run wrote can be read."""

    def __init__(self, path: Path) -> None:
        """Create the file.

        Raises:
            RefusedSetting: it exists or cannot be made.
        """
        self.failure: str | None = None
        # Slots that were not kept.
        self.dropped = 0
        self._file = create_recording(path)

    def on_observation(self, observation: TimedObservation) -> None:
        """Do nothing: pictures do not go into JSON."""

    def on_chunk(self, chunk: TimedChunk) -> None:
        """Do nothing: the commands that come of it are enough here."""

    def on_step(self, record: StepRecord) -> None:
        """Append one line.

        Raises:
            OSError: once, where the disk takes no more.
        """
        if self.failure is not None:
            self.dropped += 1
            return
        value = {**asdict(record), "state": record.state.value}
        value["age_ms"], value["late_ms"] = record.age_ms, record.late_ms
        try:
            self._file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
        except OSError as error:
            self.failure = f"{type(error).__name__}: {error}"
            self.dropped += 1
            raise

    def close(self) -> None:
        """Flush and close the file; what a full disk did not take is logged as lost."""
        try:
            self._file.close()
        except OSError as error:
            self.failure = self.failure or f"{type(error).__name__}: {error}"
        if self.failure is not None:
            _LOG.error("the rest of the run was not recorded: %s", self.failure)

"""Inference beside execution: one policy on one thread, one request at a time."""

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jetson.control.loop_clock import LoopClock
from jetson.control.sources import TimedObservation
from jetson.policy import UnsafeAction
from qvla_export.shared.action import ActionChunk, ActionPolicy


@dataclass(frozen=True)
class InferenceResult:
    """How one request ended: with a chunk or with an error."""

    observation: TimedObservation
    chunk: ActionChunk | None
    error: Exception | None
    # From the request to the end, milliseconds.
    infer_ms: float

    def checked_actions(self, dimensions: int) -> NDArray[np.float32]:
        """Return the chunk's actions: finite, float32 [steps, dimensions].

        Raises:
            UnsafeAction: they are not.
            Exception: whatever kept the engine from answering.
        """
        if self.chunk is None:
            raise self.error or UnsafeAction("the inference returned nothing")
        actions = np.asarray(self.chunk.actions, np.float32)
        if actions.ndim != 2 or actions.shape[1] != dimensions or not len(actions):
            raise UnsafeAction(f"a chunk must be [steps, {dimensions}], got {list(actions.shape)}")
        if not np.isfinite(actions).all():
            bad = np.argwhere(~np.isfinite(actions)).tolist()
            raise UnsafeAction(f"NaN or infinity at [step, dimension] {bad[:4]}")
        return actions


class Inference(Protocol):
    """Where chunks are computed."""

    @property
    def busy(self) -> bool:
        """Whether a request is under way or its result has not been taken."""
        ...

    def request(self, observation: TimedObservation) -> None:
        """Start computing; only when not busy."""
        ...

    def poll(self) -> InferenceResult | None:
        """Take a result that is ready; never waits."""
        ...

    def close(self) -> None:
        """Release the thread."""
        ...


class ThreadedInference:
    """Runs a policy on a thread of its own, so that a slow engine never delays a command."""

    def __init__(self, policy: ActionPolicy, clock: LoopClock) -> None:
        self._policy = policy
        self._clock = clock
        self._wanted: TimedObservation | None = None
        self._result: InferenceResult | None = None
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: an engine that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="qvla-inference", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a request is under way or its result has not been taken."""
        return self._busy

    def request(self, observation: TimedObservation) -> None:
        """Hand an observation to the thread."""
        with self._changed:
            self._busy = True
            self._wanted = observation
            self._changed.notify()

    def poll(self) -> InferenceResult | None:
        """Take a result that is ready."""
        with self._changed:
            result, self._result = self._result, None
            if result is not None:
                self._busy = False
            return result

    def close(self) -> None:
        """End the thread; one that is inside an engine is left to itself after a second."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=1.0)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted is not None)
                if self._closed or self._wanted is None:
                    return
                observation, self._wanted = self._wanted, None
            result = infer(self._policy, observation, self._clock)
            with self._changed:
                self._result = result


class InlineInference:
    """Runs a policy while the loop waits: for simulated time, where thinking takes none."""

    def __init__(self, policy: ActionPolicy, clock: LoopClock) -> None:
        self._policy = policy
        self._clock = clock
        self._result: InferenceResult | None = None

    @property
    def busy(self) -> bool:
        """Whether the last result has not been taken."""
        return self._result is not None

    def request(self, observation: TimedObservation) -> None:
        """Compute at once."""
        self._result = infer(self._policy, observation, self._clock)

    def poll(self) -> InferenceResult | None:
        """Take the last result."""
        result, self._result = self._result, None
        return result

    def close(self) -> None:
        """Do nothing: there is no thread."""


def infer(policy: ActionPolicy, observation: TimedObservation, clock: LoopClock) -> InferenceResult:
    """Ask a policy once; whatever it raises is the result."""
    start_s = clock.now_s()
    chunk: ActionChunk | None = None
    error: Exception | None = None
    try:
        chunk = policy.infer(observation.observation)
    except Exception as failure:  # an engine may raise anything; the loop holds the robot for it
        error = failure
    return InferenceResult(observation, chunk, error, (clock.now_s() - start_s) * 1000.0)

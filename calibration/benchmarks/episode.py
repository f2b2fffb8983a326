"""One closed-loop episode: look, think, act, with the time that thinking takes."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.delay import CommandQueue
from calibration.benchmarks.evaluation import EpisodeResult, RolloutConfig
from calibration.benchmarks.metaworld.roll_forward import hand_ahead
from calibration.benchmarks.metaworld.shifts import shift_of
from calibration.benchmarks.metaworld.tasks import Task, scene_siblings
from calibration.benchmarks.motion import Motion, closes, measure_motion
from calibration.benchmarks.phases import Phase, phase_of
from calibration.benchmarks.simulators import BenchmarkSimulator
from qvla_export.shared.action import ActionChunk, ActionPolicy, following
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

_BLANK = 127


def run_episode(
    simulator: BenchmarkSimulator,
    policy: ActionPolicy,
    config: RolloutConfig,
    seed: int,
    reference: ActionPolicy | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> EpisodeResult:
    """Run one episode: look, act for `execute` control steps, look again.

    Time passes while the policy thinks if the configuration says so: a fixed number of steps, or
    live, as long as it took by the clock (seconds). See `CommandQueue`.
    """
    observation = _begin(simulator, config, seed)
    record = _Record(simulator)
    queue = CommandQueue(config.execute, config.seam_limit_mm / (simulator.task.unit_mm or 1.0))
    delay, chunk = config.delay_steps, None
    while not simulator.done:
        # Of a live policy, what the last thought took is the best guess for this one.
        foreseen = delay if config.roll_forward else 0
        if foreseen and record.actions:
            observation = simulator.observe(hand_ahead(record.actions, queue.committed(foreseen)))
        seen = _blank_out(observation) if config.control == "blank-image" else observation
        seen = following(seen, chunk)
        began_s = clock()
        chunk = _usable(policy.infer(seen))
        if config.live:
            infer_s = clock() - began_s
            record.infer_ms.append(1000.0 * infer_s)
            delay = math.ceil(infer_s * simulator.task.control_hz)
        if reference is not None:
            record.compare(chunk, _usable(reference.infer(seen)))
        for step in queue.steps(chunk.actions, delay, foreseen):
            record.act(step.action, step.chunk)
            if simulator.done:
                break
        else:
            if not config.roll_forward or not delay:
                observation = simulator.observe()
    return record.result(seed)


def _begin(simulator: BenchmarkSimulator, config: RolloutConfig, seed: int) -> Observation:
    """Start an episode with what the configuration changes of it; Meta-World's tasks alone."""
    task, instruction, shift = simulator.task, None, None
    if isinstance(task, Task):
        if config.control == "wrong-instruction":
            siblings = scene_siblings(task)
            instruction = siblings[seed % len(siblings)].instruction
        shift = shift_of(config.shift, task, seed)
    return simulator.reset(seed, instruction, shift)


class _Record:
    """What an episode leaves behind."""

    def __init__(self, simulator: BenchmarkSimulator) -> None:
        self._simulator = simulator
        self._positions = [simulator.hand]
        self._chunks: list[int] = []
        self.actions: list[NDArray[np.float32]] = []
        self.deviations: list[float] = []
        self.infer_ms: list[float] = []
        self._phases: list[Phase] = []

    def compare(self, chunk: ActionChunk, reference: ActionChunk) -> None:
        """Note how far a decision is from the reference's, and in which phase."""
        self.deviations.append(_deviation(chunk, reference))
        closing = closes(np.array([action[-1] for action in self.actions]))
        self._phases.append(phase_of(closing, self._simulator.goal_distance_m))

    def act(self, action: NDArray[np.float32], chunk: int) -> None:
        """Execute one command and note how the hand moved."""
        self._simulator.step(action)
        self.actions.append(np.clip(action, -1.0, 1.0))
        self._chunks.append(chunk)
        self._positions.append(self._simulator.hand)

    def result(self, seed: int) -> EpisodeResult:
        """Return the episode."""
        simulator = self._simulator
        result = simulator.task.name, seed, simulator.success, simulator.steps
        decisions = tuple(self.deviations), self._motion(), tuple(self.infer_ms)
        return EpisodeResult(*result, *decisions, tuple(self._phases))

    def _motion(self) -> Motion | None:
        """Return how the hand moved; None where actions are no steps of one hand."""
        task = self._simulator.task
        if task.unit_mm is None:
            return None
        actions = np.stack(self.actions)
        return measure_motion(
            np.stack(self._positions),
            # Steps of the hand and the gripper, without turns of the wrist.
            np.concatenate([actions[:, :3], actions[:, -1:]], axis=1),
            np.flatnonzero(np.diff(self._chunks)) + 1,
            task.control_hz,
            task.unit_mm,
        )


def _blank_out(observation: Observation) -> Observation:
    blank = {name: np.full_like(image, _BLANK) for name, image in observation.images.items()}
    return replace(observation, images=blank)


def _usable(chunk: ActionChunk) -> ActionChunk:
    if not len(chunk.actions):
        raise QvlaError("a policy must return at least one action, got an empty chunk")
    if not (np.isfinite(chunk.actions).all() and np.isfinite(chunk.normalized).all()):
        raise QvlaError(
            "a policy must return finite actions, got NaN or infinity; no episode with them counts"
        )
    return chunk


def _deviation(chunk: ActionChunk, reference: ActionChunk) -> float:
    ours, theirs = chunk.normalized, reference.normalized
    if ours.shape != theirs.shape:
        raise QvlaError(
            f"policy and reference must return chunks of one shape, got {list(ours.shape)} and "
            f"{list(theirs.shape)}"
        )
    return float(np.square(ours.astype(np.float64) - theirs).sum())

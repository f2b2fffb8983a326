"""Policies for rollouts without a network; factories of worker processes import them from here."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.metaworld.experts import Expert
from calibration.benchmarks.metaworld.simulator import Simulator
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation


def chunk_of(actions: NDArray[np.float32], offset: float = 0.0) -> ActionChunk:
    return ActionChunk(actions, (actions + np.float32(offset)).astype(np.float32))


@dataclass
class HashPolicy:
    """Acts at random, but always the same on the same observation."""

    horizon: int = 8
    # Added to the normalized actions only, so that the episodes stay the same.
    offset: float = 0.0

    def infer(self, observation: Observation) -> ActionChunk:
        digest = hashlib.sha256(observation.instruction.encode() + observation.state.tobytes())
        for image in observation.images.values():
            digest.update(image.tobytes())
        random = np.random.default_rng(list(digest.digest()))
        return chunk_of(random.uniform(-1, 1, (self.horizon, 4)).astype(np.float32), self.offset)


@dataclass
class ConstantPolicy:
    """Returns one chunk and remembers what it saw."""

    actions: NDArray[np.float32] = field(default_factory=lambda: np.zeros((8, 4), np.float32))
    normalized: NDArray[np.float32] | None = None
    seen: list[Observation] = field(default_factory=list)

    def infer(self, observation: Observation) -> ActionChunk:
        self.seen.append(observation)
        normalized = self.actions if self.normalized is None else self.normalized
        return ActionChunk(self.actions, normalized)


@dataclass
class ExpertPolicy:
    """The scripted expert of a simulator that the test owns; it looks behind the picture."""

    simulator: Simulator

    def __post_init__(self) -> None:
        self._expert = Expert(self.simulator.task)

    def infer(self, observation: Observation) -> ActionChunk:
        return chunk_of(self._expert.act(self.simulator.full_state)[None])


@dataclass
class FailingPolicy:
    """A `HashPolicy` that raises at its n-th decision."""

    error: Callable[[], BaseException]
    decisions: int
    policy: HashPolicy = field(default_factory=HashPolicy)

    def infer(self, observation: Observation) -> ActionChunk:
        self.decisions -= 1
        if self.decisions < 0:
            raise self.error()
        return self.policy.infer(observation)


def refuse_to_open() -> HashPolicy:
    raise QvlaError("this policy cannot be opened")


def die() -> HashPolicy:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")

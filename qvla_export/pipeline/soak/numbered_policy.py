"""A policy whose actions say which request they answer, and whose engine fails when told to."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.images import ImageSpec
from qvla_export.shared.normalization import Bounds, Statistics
from qvla_export.shared.observation import Observation
from qvla_export.shared.processor import Processor, ProcessorSpec

CAMERAS = ("image", "wrist_image")
HORIZON, DIMENSIONS, STATE = 8, 4, 2
# Powers of two, so that float32 holds every number of a client and a request exactly.
CLIENTS, REQUESTS = 64, 1 << 20
CONTRACT = PolicyContract(CAMERAS, HORIZON, DIMENSIONS, STATE, "soak", "numbered", "none")
_SIDE = 16
_SLOW_S = 0.3


def observation_of(client: int, request: int, seed: int = 0) -> Observation:
    """Return what a client sees when it asks for the so manieth time."""
    pixels = np.random.default_rng((seed, client)).integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)
    state = np.array([client / CLIENTS, request % REQUESTS / REQUESTS], np.float32)
    return Observation(dict.fromkeys(CAMERAS, pixels), f"do {client}", state)


def answers(actions: NDArray[Any], client: int, request: int) -> bool:
    """Say whether actions are those of this very request: a chunk, or vla-eval's one."""
    right = np.array([client / CLIENTS, request % REQUESTS / REQUESTS], np.float32)
    return actions.shape in ((HORIZON, DIMENSIONS), (1, DIMENSIONS)) and bool(
        (actions[:, :2] == right).all()
    )


def limits() -> Bounds:
    """Return the limits of the actions, which the server's guard knows too."""
    one = np.ones(DIMENSIONS)
    return Bounds(-one, one, np.ones(DIMENSIONS, bool))


@dataclass
class NumberedPolicy:
    """Repeats the state of what it sees; an `ActionPolicy`."""

    # Shared with whoever starts the server: `value` is 1 while the engine is to fail.
    failing: Any
    seed: int = 0
    contract: PolicyContract = CONTRACT
    processor: Processor = field(default_factory=lambda: _processor())

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def infer(self, observation: Observation) -> ActionChunk:
        """Act, or fail as engines do: an exception, a delay, NaN, another shape, an absurd one."""
        actions = np.zeros((HORIZON, DIMENSIONS), np.float32)
        actions[:, :2] = observation.state
        fault = self._rng.integers(10) if self.failing.value else -1
        if fault == 0:
            raise RuntimeError("an engine that fails now and then")
        if fault == 1:
            time.sleep(_SLOW_S * self._rng.random())
        elif fault == 2:
            actions[self._rng.integers(HORIZON)] = self._rng.choice([np.nan, np.inf, -np.inf])
        elif fault == 3:
            actions = actions[:, : self._rng.integers(1, DIMENSIONS)]
        elif fault == 4:
            actions[self._rng.integers(HORIZON)] = 1e6
        return ActionChunk(actions, actions)


def _processor() -> Processor:
    """Return what tells the guard which actions are absurd."""
    image = ImageSpec(_SIDE, "resize-naive", ((0.0, 0.0, 0.0),), ((1.0, 1.0, 1.0),))
    spec = ProcessorSpec(CAMERAS, image, HORIZON, DIMENSIONS, STATE, 1, 2)
    one = np.ones(STATE)
    state = Bounds(-one, one, np.ones(STATE, bool))
    return Processor(spec, Statistics("soak", limits(), state))

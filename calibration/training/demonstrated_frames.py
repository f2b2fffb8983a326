"""Demonstrations as a policy of any family is trained on them: what was seen, and done then."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.sources.lerobot import LeRobotDataset
from calibration.training.training_data import chunks_of, data_statistics, stacked_images
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class DemonstratedFrames:
    """All frames of a data set in memory, of one camera."""

    camera: str
    # uint8 [n, h, w, 3]
    images: NDArray[np.uint8]
    # In physical units.  float32 [n, state]
    states: NDArray[np.float32]
    # Of each episode.  float32 [frames, dim]
    actions: Sequence[NDArray[np.float32]]
    # Of each frame.
    instructions: Sequence[str]
    # Of state ("proprio") and actions, as `dataset_statistics.json` has them.
    statistics: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def action_dim(self) -> int:
        """Return the numbers of an action."""
        return int(self.actions[0].shape[1])

    @property
    def state_dim(self) -> int:
        """Return the numbers of a state."""
        return int(self.states.shape[1])

    @property
    def phrases(self) -> list[str]:
        """Return all different instructions."""
        return sorted(set(self.instructions))

    @property
    def digest(self) -> str:
        """SHA-256 of what was seen and done."""
        digest = hashlib.sha256("\n".join((self.camera, *self.instructions)).encode())
        arrays: list[NDArray[Any]] = [self.images, self.states, *self.actions]
        for values in arrays:
            digest.update(f"{values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def observation(self, row: int) -> Observation:
        """Return what a policy sees at a frame."""
        return Observation(
            {self.camera: self.images[row]}, self.instructions[row], self.states[row]
        )

    def chunks(self, horizon: int) -> NDArray[np.float32]:
        """Return the actions from each frame on; the last one repeats after an episode's end.

        float32 [n, horizon, dim]
        """
        return np.concatenate([chunks_of(actions, horizon) for actions in self.actions])


def load_demonstrations(dataset: LeRobotDataset, camera: str) -> DemonstratedFrames:
    """Read a whole data set into memory.

    Raises:
        QvlaError: it lacks the camera, actions or a state, or its pictures differ in size.
    """
    keys = dataset.keys
    if camera not in keys.images:
        raise QvlaError(
            f"the policy sees camera {camera!r}, {dataset.root} has {sorted(keys.images)}"
        )
    for name, column in (("actions", keys.action), ("states", keys.state)):
        if column is None:
            raise QvlaError(f"{dataset.root} has no column of {name}, which training needs")
    episodes = [dataset.episode(number) for number in range(len(dataset.episodes))]
    return DemonstratedFrames(
        camera,
        stacked_images(episodes, camera),
        np.concatenate([e.state for e in episodes]),
        tuple(e.action for e in episodes),
        tuple(e.instruction_at(frame) for e in episodes for frame in range(len(e))),
        data_statistics(episodes),
    )

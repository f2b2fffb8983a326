"""Small LeRobot data sets of smooth random episodes, written without a simulator."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from calibration.sources.image_codec import encode_png
from calibration.sources.lerobot_writer import Episode, write_dataset

INSTRUCTIONS = ("push the button", "open the small drawer slowly", "close the window")


def make_episode(
    number: int,
    frames: int,
    side: int | tuple[int, int] = 28,
    dims: int = 4,
    action_dims: int | None = None,
    cameras: Sequence[str] = ("image",),
) -> Episode:
    """Return one episode; its number is its red level and its instruction."""
    random = np.random.default_rng(number)
    states = np.cumsum(random.normal(0, 0.05, (frames, dims)), axis=0).astype(np.float32)
    height, width = side if isinstance(side, tuple) else (side, side)
    pictures = {}
    for name in cameras:
        seen = random.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        seen[..., 0] = number
        pictures[name] = [encode_png(picture) for picture in seen]
    instruction = INSTRUCTIONS[number % len(INSTRUCTIONS)]
    actions = np.clip(np.sin(7 * states[:, :action_dims]) + 0.1, -1, 1).astype(np.float32)
    return Episode(instruction, pictures, states, actions)


def write_small_dataset(
    root: Path,
    lengths: Sequence[int],
    side: int | tuple[int, int] = 28,
    dims: int = 4,
    action_dims: int | None = None,
    cameras: Sequence[str] = ("image",),
) -> Path:
    """Write a data set with episodes of these lengths; actions are as long as states by default."""
    with write_dataset(root, 40, "test") as writer:
        for number, frames in enumerate(lengths):
            writer.add(make_episode(number, frames, side, dims, action_dims, cameras))
    return root

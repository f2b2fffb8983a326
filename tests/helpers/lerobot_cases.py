"""Small checkpoints in LeRobot's layout: configuration, processor files, statistics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibration.sources.image_codec import encode_png
from calibration.sources.lerobot_writer import Episode, write_dataset
from qvla_export.policies.lerobot.new_checkpoint import Features, save_description

SIDES = (16, 24)


def small_features(
    state: int,
    action: int,
    mode: str = "MEAN_STD",
    cameras: Sequence[str] = ("top",),
    visual: str = "MEAN_STD",
) -> Features:
    """Return what a policy sees and returns; `mode` normalizes states and actions."""
    modes = {"VISUAL": visual, "STATE": mode, "ACTION": mode}
    return Features(dict.fromkeys(cameras, SIDES), state, action, modes)


def write_description(
    path: Path,
    features: Features,
    statistics: Mapping[str, Mapping[str, Any]],
    fields: Mapping[str, Any] | None = None,
    steps: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write all but weights of a checkpoint: ACT's, unless `fields` of config.json say more."""
    path.mkdir(parents=True, exist_ok=True)
    whole = {"type": "act", "chunk_size": 5, **(fields or {})}
    save_description(path, features, whole, statistics, steps)
    return path


def write_act_dataset(root: Path, lengths: Sequence[int], sides: tuple[int, int]) -> Path:
    """Write a LeRobot data set of two cameras, top and wrist, and states and actions of 14."""
    generator = np.random.default_rng(0)
    with write_dataset(root, 30, "test") as writer:
        for frames in lengths:
            pictures = {
                name: [encode_png(_picture(generator, sides)) for _ in range(frames)]
                for name in ("top", "wrist")
            }
            states = generator.normal(0, 1, (frames, 14)).astype(np.float32)
            writer.add(Episode("move", pictures, states, np.sin(states)))
    return root


def _picture(generator: np.random.Generator, sides: tuple[int, int]) -> Any:
    """Return a smooth picture: a few coarse squares of color."""
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    rows, columns = (np.arange(side) * 4 // side for side in sides)
    return coarse[rows][:, columns]

"""Statistics of demonstrations by LeRobot's names of features."""

from typing import Any

import numpy as np

from calibration.training.demonstrated_frames import DemonstratedFrames
from qvla_export.policies.lerobot.new_checkpoint import camera_key
from qvla_export.shared.lerobot.lerobot_config import ACTION, STATE


def feature_tables(demonstrations: DemonstratedFrames) -> dict[str, dict[str, Any]]:
    """Return mean, standard deviation and range of states and actions."""
    names = {STATE: "proprio", ACTION: "action"}
    return {
        feature: {n: demonstrations.statistics[part][n] for n in ("mean", "std", "min", "max")}
        for feature, part in names.items()
    }


def picture_table(demonstrations: DemonstratedFrames) -> dict[str, dict[str, Any]]:
    """Return mean and standard deviation of the pictures' channels, 0 to 1.  [3, 1, 1] each"""
    levels = np.arange(256) / 255
    shares = np.stack(
        [np.bincount(demonstrations.images[..., c].reshape(-1), minlength=256) for c in range(3)]
    )
    shares = shares / shares.sum(axis=1, keepdims=True)
    mean = shares @ levels
    std = np.sqrt(shares @ levels**2 - mean**2)
    table = {"mean": mean[:, None, None].tolist(), "std": std[:, None, None].tolist()}
    return {camera_key(demonstrations.camera): table}

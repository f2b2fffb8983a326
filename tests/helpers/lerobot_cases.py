"""Small checkpoints in LeRobot's layout: configuration, processor files, statistics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

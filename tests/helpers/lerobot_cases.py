"""Small checkpoints in LeRobot's layout: configuration, processor files, statistics."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from calibration.sources.image_codec import encode_png
from calibration.sources.lerobot_writer import Episode, write_dataset

_BEFORE, _AFTER = "observation.safetensors", "action.safetensors"
SIDES = (16, 24)


def lerobot_folder(
    path: Path,
    state: int,
    action: int,
    mode: str,
    cameras: Sequence[str] = ("top",),
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write config.json and processor files without statistics."""
    path.mkdir(parents=True, exist_ok=True)
    shape = [3, *SIDES]
    inputs = {f"observation.images.{c}": {"type": "VISUAL", "shape": shape} for c in cameras}
    inputs["observation.state"] = {"type": "STATE", "shape": [state]}
    outputs = {"action": {"type": "ACTION", "shape": [action]}}
    modes = {"VISUAL": "MEAN_STD", "STATE": mode, "ACTION": mode}
    config = {
        "type": "act",
        "input_features": inputs,
        "output_features": outputs,
        "use_peft": False,
        "chunk_size": 5,
        "normalization_mapping": modes,
        **(more or {}),
    }
    (path / "config.json").write_text(json.dumps(config))
    how = {"eps": 1e-8, "features": {**inputs, **outputs}, "norm_map": modes}
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
        {"registry_name": "normalizer_processor", "config": how, "state_file": _BEFORE},
    ]
    after = [
        {"registry_name": "unnormalizer_processor", "config": how, "state_file": _AFTER},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
    ]
    for name, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        (path / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps}))
    return path


def write_statistics(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the statistics of features, the same to both processors' files."""
    tensors = {
        f"{feature}.{name}": np.asarray(values, np.float32)
        for feature, table in tables.items()
        for name, values in table.items()
    }
    for name in (_BEFORE, _AFTER):
        save_file(tensors, path / name)


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

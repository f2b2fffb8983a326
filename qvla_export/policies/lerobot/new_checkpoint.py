"""What a new checkpoint in LeRobot's layout is made of, beside its network: texts and statistics.

Source: lerobot 0.6.1 `policies/factory.py` (steps of the processors), `configs/policies.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qvla_export.policies.lerobot.weights import PREFIX
from qvla_export.shared.lerobot.lerobot_config import ACTION, CONFIG, STATE
from qvla_export.shared.lerobot.lerobot_statistics import (
    NORMALIZER,
    POSTPROCESSOR,
    PREPROCESSOR,
    UNNORMALIZER,
)

_DEVICE = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}


@dataclass(frozen=True)
class Features:
    """What a policy sees and returns, and how that is normalized."""

    # Name of a camera -> height and width of its pictures.
    cameras: Mapping[str, tuple[int, int]]
    state_dim: int
    action_dim: int
    # "VISUAL", "STATE", "ACTION" -> how such features are normalized.
    modes: Mapping[str, str]

    @property
    def inputs(self) -> dict[str, Any]:
        """Return `input_features` of config.json."""
        pictures = {
            camera_key(name): {"type": "VISUAL", "shape": [3, *sides]}
            for name, sides in self.cameras.items()
        }
        return {**pictures, STATE: {"type": "STATE", "shape": [self.state_dim]}}

    @property
    def outputs(self) -> dict[str, Any]:
        """Return `output_features` of config.json."""
        return {ACTION: {"type": "ACTION", "shape": [self.action_dim]}}


def camera_key(name: str) -> str:
    """Return LeRobot's name of a camera's pictures."""
    return f"observation.images.{name}"


def save_description(
    folder: Path,
    features: Features,
    fields: Mapping[str, Any],
    statistics: Mapping[str, Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write config.json, both processor files and their statistics into an existing folder.

    Args:
        folder: where.
        features: what the policy sees and returns.
        fields: of config.json beside these; the policy's `type` among them.
        statistics: feature -> statistic -> numbers.
        steps: of the preprocessor, the family's own.
    """
    described = {"input_features": features.inputs, "output_features": features.outputs}
    modes = {"normalization_mapping": dict(features.modes)}
    config = {**fields, **described, **modes, "use_peft": False}
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    both = {**features.inputs, **features.outputs}
    how = {"eps": 1e-8, "features": both, "norm_map": dict(features.modes)}
    files = {name: f"{name}_statistics.safetensors" for name in (PREPROCESSOR, POSTPROCESSOR)}
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        *steps,
        _DEVICE,
        {"registry_name": NORMALIZER, "config": how, "state_file": files[PREPROCESSOR]},
    ]
    after = [
        {"registry_name": UNNORMALIZER, "config": how, "state_file": files[POSTPROCESSOR]},
        _DEVICE,
    ]
    tensors = {
        f"{feature}.{name}": torch.tensor(values, dtype=torch.float32)
        for feature, table in statistics.items()
        for name, values in table.items()
    }
    for name, listed in ((PREPROCESSOR, before), (POSTPROCESSOR, after)):
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": listed}, indent=1))
        save_file(tensors, folder / files[name])


def save_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write model.safetensors in bfloat16 into an existing folder.

    Args:
        folder: where.
        tensors: by LeRobot's names, without `model.`.
    """
    stored = {f"{PREFIX}{name}": t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}
    save_file(stored, folder / "model.safetensors")

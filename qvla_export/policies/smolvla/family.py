"""SmolVLA as a `Family`: how its checkpoints are recognized and opened."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import PROMPT_TOKENS
from qvla_export.policies.lerobot.family import LeRobotFamily
from qvla_export.policies.lerobot.files import check_files
from qvla_export.policies.prismatic.files import stored_headers
from qvla_export.policies.smolvla.config import (
    STEPS,
    read_smolvla_config,
    read_vlm_config,
    vlm_assumptions,
    vlm_folder,
)
from qvla_export.shared.lerobot.lerobot_config import read_lerobot_config

if TYPE_CHECKING:
    from qvla_export.policies.smolvla.policy import SmolVlaPolicy

_PATCHES = "vision_model.embeddings.patch_embedding.weight"


class SmolVlaFamily(LeRobotFamily):
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name = model_type = "smolvla"
    title = "SmolVLA"
    unsmoothed = "it is not built here"

    def assumptions(self, checkpoint: Path, preset: str | None) -> Mapping[str, object]:
        """Return what the VLM's config.json leaves to transformers' defaults."""
        return vlm_assumptions(vlm_folder(checkpoint, read_lerobot_config(checkpoint, preset)))

    def inputs(self, checkpoint: Path, preset: str | None) -> PolicyInputs:
        """Return what decides the rows of the layers; reads no weights."""
        config = read_lerobot_config(checkpoint, preset)
        own, vlm = read_smolvla_config(config), read_vlm_config(vlm_folder(checkpoint, config))
        patch = next(s.shape[-1] for s in stored_headers(checkpoint) if s.key.endswith(_PATCHES))
        return PolicyInputs(
            images=len(config.cameras),
            image_size=max(own.picture),
            prompt_tokens=PROMPT_TOKENS,
            horizon=own.horizon,
            action_dim=config.action_dim,
            state_dim=config.state_dim,
            flow_steps=own.flow.steps,
            action_width=own.action_width,
            image_tokens=(max(own.picture) // patch // vlm.scale_factor) ** 2,
            state_in_prefix=True,
        )

    def load(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> "SmolVlaPolicy":
        """Load a checkpoint folder whole; see `load_smolvla_policy`."""
        from qvla_export.policies.smolvla.policy import load_smolvla_policy

        return load_smolvla_policy(checkpoint, unnorm_key, preset)

    def check_files(self, checkpoint: Path, preset: str | None) -> None:
        """Refuse a folder by its files' names and headers; see `lerobot.files.check_files`."""
        config = read_lerobot_config(checkpoint, preset)
        read_smolvla_config(config)
        read_vlm_config(vlm_folder(checkpoint, config))
        check_files(checkpoint, STEPS)

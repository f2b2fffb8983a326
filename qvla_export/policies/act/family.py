"""ACT as a `Family`: how its checkpoints are recognized and opened."""

from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.policies.act.config import read_act_config
from qvla_export.policies.lerobot.family import LeRobotFamily
from qvla_export.policies.lerobot.files import check_files
from qvla_export.shared.lerobot.lerobot_config import read_lerobot_config

if TYPE_CHECKING:
    from qvla_export.policies.act.policy import ActPolicy


class ActFamily(LeRobotFamily):
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name = model_type = "act"
    title = "ACT"
    unsmoothed = "its norms feed the residual stream"

    def inputs(self, checkpoint: Path, preset: str | None) -> PolicyInputs:
        """Return what decides the rows of the layers; reads no weights."""
        config = read_lerobot_config(checkpoint, preset)
        own = read_act_config(config)
        camera = next(iter(config.cameras.values()))
        return PolicyInputs(
            images=len(config.cameras),
            image_size=camera.width,
            image_height=camera.height,
            prompt_tokens=0,
            horizon=own.horizon,
            action_dim=config.action_dim,
            state_dim=config.state_dim,
        )

    def load(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> "ActPolicy":
        """Load a checkpoint folder whole; see `load_act_policy`."""
        from qvla_export.policies.act.policy import load_act_policy

        return load_act_policy(checkpoint, unnorm_key, preset)

    def check_files(self, checkpoint: Path, preset: str | None) -> None:
        """Refuse a folder by its files' names and headers; see `lerobot.files.check_files`."""
        read_act_config(read_lerobot_config(checkpoint, preset))
        check_files(checkpoint, ())

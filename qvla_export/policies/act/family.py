"""ACT as a `Family`: how its checkpoints are recognized and opened."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.policies.act.config import read_act_config
from qvla_export.policies.lerobot.files import check_files
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.lerobot.lerobot_config import is_lerobot, read_lerobot_config

if TYPE_CHECKING:
    from torch import Tensor

    from qvla_export.policies.act.policy import ActPolicy


class ActFamily:
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name = "act"
    model_type = "act"
    sizes: tuple[str, ...] = ()

    def recognizes(self, checkpoint: Path) -> bool:
        """Whether config.json is of a LeRobot policy of type "act"."""
        return is_lerobot(checkpoint) and read_lerobot_config(checkpoint).type == self.model_type

    def inputs(self, checkpoint: Path, preset: str | None) -> PolicyInputs:
        """Return what decides the rows of the layers; reads no weights."""
        config = read_lerobot_config(checkpoint, preset)
        own = read_act_config(config)
        camera = next(iter(config.cameras.values()))
        return PolicyInputs(
            images=len(config.cameras),
            image_size=max(camera.height, camera.width),
            prompt_tokens=0,
            horizon=own.horizon,
            action_dim=config.action_dim,
            state_dim=config.state_dim,
        )

    def can_stay_on_disk(self, checkpoint: Path, preset: str | None) -> bool:
        """Whether weights can be left on disk: no, they are small."""
        return False

    def open(
        self, checkpoint: Path, unnorm_key: str | None, preset: str | None, resident: bool
    ) -> "ActPolicy":
        """Load a checkpoint folder; see `load_act_policy`.

        Raises:
            CheckpointError: its weights are to be left on disk.
        """
        from qvla_export.policies.act.policy import load_act_policy

        if not resident:
            raise CheckpointError(f"{checkpoint}: an ACT policy is small and is loaded whole")
        return load_act_policy(checkpoint, unnorm_key, preset)

    def check(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> None:
        """Refuse what `open` would refuse."""
        self.open(checkpoint, unnorm_key, preset, resident=True)

    def check_files(self, checkpoint: Path, preset: str | None) -> None:
        """Refuse a folder by its files' names and headers; see `lerobot.files.check_files`."""
        read_act_config(read_lerobot_config(checkpoint, preset))
        check_files(checkpoint, ())

    def write_smoothed(
        self, checkpoint: Path, output: Path, factors: "Mapping[str, Tensor]", keep_types: bool
    ) -> None:
        """Refuse: the norms of ACT feed the residual stream, which nothing can be moved out of.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"{checkpoint}: an ACT policy cannot be smoothed, its norms feed the residual stream"
        )

    def write_random_checkpoint(
        self,
        output: Path,
        size: str,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Refuse: there is no published size of it.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"there is no published size {size!r} of an ACT policy")

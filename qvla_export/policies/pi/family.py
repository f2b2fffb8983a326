"""pi0 and pi0.5 as a `Family`: how their checkpoints are recognized, opened and written anew."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import PROMPT_TOKENS
from qvla_export.policies.pi.config import ASSUMED, is_pi, load_config, stated_fields
from qvla_export.policies.pi.files import action_width, check_files, image_side
from qvla_export.policies.prismatic.files import stored_headers
from qvla_export.shared.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from qvla_export.policies.pi.policy import PiPolicy


class PiFamily:
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name = "pi"
    model_type = "pi0"
    sizes: tuple[str, ...] = ()

    def recognizes(self, checkpoint: Path) -> bool:
        """Whether config.json is openpi's, or LeRobot's of a pi0 or pi0.5."""
        return is_pi(checkpoint)

    def describe(self, checkpoint: Path, preset: str | None) -> str:
        """Say in one line what a checkpoint was found to be, and what is assumed of it.

        Raises:
            CheckpointError, ArtifactError, StatisticsError: as `load_config`.
        """
        config, stated = load_config(checkpoint, preset), stated_fields(checkpoint, preset)
        name = "pi0.5" if config.adaptive else "pi0"
        what = f"{checkpoint}: {name}, {config.horizon} actions of {config.action_dim}"
        assumed = [
            f"{field} {'/'.join(value) if isinstance(value, tuple) else value}"
            for field, value in vars(config).items()
            if field in ASSUMED and field not in stated
        ]
        return f"{what}; assumed: {', '.join(assumed)}" if assumed else what

    def inputs(self, checkpoint: Path, preset: str | None) -> PolicyInputs:
        """Return what decides the rows of the layers; reads no weights, but their shapes."""
        config = load_config(checkpoint, preset)
        shapes = {
            stored.key.removeprefix("model."): stored.shape for stored in stored_headers(checkpoint)
        }
        return PolicyInputs(
            images=len(config.cameras),
            image_size=image_side(shapes),
            prompt_tokens=PROMPT_TOKENS,
            horizon=config.horizon,
            action_dim=config.action_dim,
            state_dim=0 if config.adaptive else config.state_dim,
            flow_steps=config.flow_steps,
            action_width=action_width(shapes),
            adaptive=config.adaptive,
        )

    def can_stay_on_disk(self, checkpoint: Path, preset: str | None) -> bool:
        """Whether weights can be left on disk: no, parts are not small enough to gain by it."""
        return False

    def open(
        self, checkpoint: Path, unnorm_key: str | None, preset: str | None, resident: bool
    ) -> "PiPolicy":
        """Load a checkpoint folder; see `load_pi_policy`."""
        from qvla_export.policies.pi.policy import load_pi_policy

        config = load_config(checkpoint, preset, unnorm_key)
        return load_pi_policy(checkpoint, unnorm_key, config, resident)

    def check(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> None:
        """Refuse what `open` would refuse; see `check_pi_checkpoint`."""
        from qvla_export.policies.pi.policy import check_pi_checkpoint

        check_pi_checkpoint(checkpoint, unnorm_key, load_config(checkpoint, preset, unnorm_key))

    def check_files(self, checkpoint: Path, preset: str | None) -> None:
        """Refuse a folder by its files' names and headers; see `pi.files.check_files`."""
        check_files(checkpoint)

    def write_smoothed(
        self, checkpoint: Path, output: Path, factors: "Mapping[str, Tensor]", keep_types: bool
    ) -> None:
        """Refuse: the norms before most layers can take no factor."""
        raise CheckpointError(
            f"{checkpoint}: pi0 and pi0.5 cannot be smoothed on disk: Gemma's norms multiply by "
            "1 + weight; leave smoothing out"
        )

    def write_random_checkpoint(
        self,
        output: Path,
        size: str,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Refuse: no published size is known here."""
        raise CheckpointError(f"{size!r} is no size of pi0 or pi0.5 that can be written")

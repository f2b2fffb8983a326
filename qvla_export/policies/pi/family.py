"""pi0 and pi0.5 as a `Family`: how their checkpoints are recognized, opened and written anew."""

from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import PROMPT_TOKENS
from qvla_export.policies.assumptions import with_assumptions
from qvla_export.policies.pi.config import assumptions, is_pi, load_config
from qvla_export.policies.pi.files import action_width, check_files, image_side
from qvla_export.policies.prismatic.files import stored_headers
from qvla_export.policies.whole_family import WholeFamily

if TYPE_CHECKING:
    from qvla_export.policies.pi.policy import PiPolicy


class PiFamily(WholeFamily):
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name = "pi"
    model_type = "pi0"
    title = "pi0 and pi0.5"
    unsmoothed = "Gemma's norms multiply by 1 + weight"

    def recognizes(self, checkpoint: Path) -> bool:
        """Whether config.json is openpi's, or LeRobot's of a pi0 or pi0.5."""
        return is_pi(checkpoint)

    def describe(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> str:
        """Say in one line what a checkpoint was found to be, and what is assumed of it.

        Raises:
            CheckpointError, ArtifactError, StatisticsError: as `load_config`.
        """
        config = load_config(checkpoint, preset, unnorm_key)
        name = "pi0.5" if config.adaptive else "pi0"
        what = f"{checkpoint}: {name}, {config.horizon} actions of {config.action_dim}"
        return with_assumptions(what, assumptions(checkpoint, preset, config))

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

    def load(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> "PiPolicy":
        """Load a checkpoint folder; see `load_pi_policy`."""
        from qvla_export.policies.pi.policy import load_pi_policy

        return load_pi_policy(checkpoint, unnorm_key, load_config(checkpoint, preset, unnorm_key))

    def check(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> None:
        """Refuse what `open` would refuse; see `check_pi_checkpoint`."""
        from qvla_export.policies.pi.policy import check_pi_checkpoint

        check_pi_checkpoint(checkpoint, unnorm_key, load_config(checkpoint, preset, unnorm_key))

    def check_files(self, checkpoint: Path, preset: str | None) -> None:
        """Refuse a folder by its files' names and headers; see `pi.files.check_files`."""
        check_files(checkpoint)

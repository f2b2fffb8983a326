"""UniVLA as a `Family`: how its checkpoints are recognized, opened and written anew."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import GEOMETRIES, PROMPT_TOKENS, find_geometry
from qvla_export.policies.prismatic.family import PrismaticFamily
from qvla_export.policies.univla.config import UniVlaConfig, load_config
from qvla_export.policies.univla.files import check_files
from qvla_export.shared.images import load_image_spec
from qvla_export.shared.policy_interface import LATENT

if TYPE_CHECKING:
    from qvla_export.policies.univla.policy import UniVlaPolicy


class UniVlaFamily(PrismaticFamily):
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name = "univla"
    sizes = tuple(name for name, size in GEOMETRIES.items() if size.inputs.head == LATENT)

    def has_head(self, head: str) -> bool:
        """Whether a head of this name is one of this family's."""
        return head == LATENT

    def config(self, checkpoint: Path, preset: str | None) -> UniVlaConfig:
        """Return what is read of `qvla_policy.json`, of a preset, or assumed."""
        return load_config(checkpoint, preset)

    def inputs(self, checkpoint: Path, preset: str | None) -> PolicyInputs:
        """Return what decides the rows of the layers; reads no weights."""
        config = load_config(checkpoint, preset)
        image = load_image_spec(checkpoint / "preprocessor_config.json")
        return PolicyInputs(
            images=len(config.cameras),
            image_size=image.size,
            prompt_tokens=PROMPT_TOKENS,
            horizon=config.horizon,
            action_dim=config.action_dim,
            head=LATENT,
            autoregressive=True,
            latent_tokens=config.latent_tokens,
        )

    def can_stay_on_disk(self, checkpoint: Path, preset: str | None) -> bool:
        """Whether weights can be left on disk: no, what is measured needs the chosen tokens."""
        return False

    def open(
        self, checkpoint: Path, unnorm_key: str | None, preset: str | None, resident: bool
    ) -> "UniVlaPolicy":
        """Load a checkpoint folder; see `load_univla_policy`."""
        from qvla_export.policies.univla.policy import load_univla_policy

        config = load_config(checkpoint, preset)
        return load_univla_policy(checkpoint, unnorm_key, config, resident)

    def check(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> None:
        """Refuse what `open` would refuse; see `check_univla_checkpoint`."""
        from qvla_export.policies.univla.policy import check_univla_checkpoint

        check_univla_checkpoint(checkpoint, unnorm_key, load_config(checkpoint, preset))

    def check_files(self, checkpoint: Path, preset: str | None) -> None:
        """Refuse a folder by its files' names and headers; see `univla.files.check_files`."""
        load_config(checkpoint, preset)
        check_files(checkpoint)

    def write_random_checkpoint(
        self,
        output: Path,
        size: str,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write a checkpoint of a published size with random weights."""
        from qvla_export.policies.univla.random_checkpoint import write_random_checkpoint

        write_random_checkpoint(output, find_geometry(size), on_progress=on_progress)

"""UniVLA as a `Family`: how its checkpoints are recognized, opened and written anew."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import GEOMETRIES, Geometry
from qvla_export.policies.prismatic.family import OnBytes, PrismaticFamily
from qvla_export.policies.univla.config import UniVlaConfig, load_config
from qvla_export.policies.univla.files import check_files
from qvla_export.shared.policy_interface import LATENT

if TYPE_CHECKING:
    from qvla_export.policies.univla.policy import UniVlaPolicy


class UniVlaFamily(PrismaticFamily[UniVlaConfig]):
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name = "univla"
    sizes = tuple(name for name, size in GEOMETRIES.items() if size.inputs.head == LATENT)

    def has_head(self, head: str) -> bool:
        """Whether a head of this name is one of this family's."""
        return head == LATENT

    def config(self, checkpoint: Path, preset: str | None) -> UniVlaConfig:
        """Return what is read of `qvla_policy.json`, of a preset, or assumed."""
        return load_config(checkpoint, preset)

    def with_head(self, inputs: PolicyInputs, config: UniVlaConfig) -> PolicyInputs:
        """Return what decides the rows of the layers: latent tokens one after the other."""
        return replace(inputs, head=LATENT, autoregressive=True, latent_tokens=config.latent_tokens)

    def load(
        self, checkpoint: Path, unnorm_key: str | None, config: UniVlaConfig, resident: bool
    ) -> "UniVlaPolicy":
        """Load a checkpoint folder; see `load_univla_policy`."""
        from qvla_export.policies.univla.policy import load_univla_policy

        return load_univla_policy(checkpoint, unnorm_key, config, resident)

    def require_files(self, checkpoint: Path, config: UniVlaConfig) -> None:
        """Refuse a folder by its files' names and headers; see `univla.files.check_files`."""
        check_files(checkpoint)

    def write_random(self, output: Path, geometry: Geometry, on_progress: OnBytes | None) -> None:
        """Write a checkpoint of a geometry with random weights."""
        from qvla_export.policies.univla.random_checkpoint import write_random_checkpoint

        write_random_checkpoint(output, geometry, on_progress=on_progress)

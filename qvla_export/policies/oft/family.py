"""OpenVLA-OFT as a `Family`: how its checkpoints are recognized, opened and written anew."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import GEOMETRIES, Geometry
from qvla_export.policies.oft.config import OftConfig, load_config
from qvla_export.policies.oft.files import check_files
from qvla_export.policies.prismatic.family import OnBytes, PrismaticFamily
from qvla_export.shared.policy_interface import AUTOREGRESSIVE, LATENT

if TYPE_CHECKING:
    from qvla_export.policies.oft.policy import OftPolicy


class OftFamily(PrismaticFamily[OftConfig]):
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name = "oft"
    sizes = tuple(name for name, size in GEOMETRIES.items() if not size.inputs.autoregressive)

    def has_head(self, head: str) -> bool:
        """Whether a head of this name is one of this family's; `load_config` judges others."""
        return head not in (AUTOREGRESSIVE, LATENT)

    def config(self, checkpoint: Path, preset: str | None) -> OftConfig:
        """Return what is read of `qvla_policy.json`, of a preset, or assumed."""
        return load_config(checkpoint, preset)

    def with_head(self, inputs: PolicyInputs, config: OftConfig) -> PolicyInputs:
        """Return what decides the rows of the layers: the head, and a diffusion head's steps."""
        return replace(
            inputs,
            head=config.head,
            denoising_steps=config.diffusion_steps if config.head == "diffusion" else 1,
        )

    def can_stay_on_disk(self, checkpoint: Path, preset: str | None) -> bool:
        """Whether weights can be left on disk: not where a head needs a table beside them."""
        return load_config(checkpoint, preset).head == "l1"

    def load(
        self, checkpoint: Path, unnorm_key: str | None, config: OftConfig, resident: bool
    ) -> "OftPolicy":
        """Load a checkpoint folder; see `load_oft_policy`."""
        from qvla_export.policies.oft.policy import load_oft_policy

        return load_oft_policy(checkpoint, unnorm_key, config, resident)

    def check(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> None:
        """Refuse what `open` would refuse; see `check_oft_checkpoint`."""
        from qvla_export.policies.oft.policy import check_oft_checkpoint

        check_oft_checkpoint(checkpoint, unnorm_key, load_config(checkpoint, preset))

    def require_files(self, checkpoint: Path, config: OftConfig) -> None:
        """Refuse a folder by its files' names and headers; see `oft.files.check_files`."""
        check_files(checkpoint, config)

    def write_random(self, output: Path, geometry: Geometry, on_progress: OnBytes | None) -> None:
        """Write a checkpoint of a geometry with random weights and LIBERO's interface."""
        from qvla_export.policies.oft.random_checkpoint import write_random_checkpoint

        write_random_checkpoint(output, geometry, on_progress=on_progress)

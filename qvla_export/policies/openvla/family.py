"""OpenVLA as a `Family`: how its checkpoints are recognized, opened and written anew."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import GEOMETRIES, Geometry
from qvla_export.policies.openvla.config import OpenVlaConfig, load_config
from qvla_export.policies.openvla.files import check_files
from qvla_export.policies.prismatic.family import OnBytes, PrismaticFamily
from qvla_export.shared.policy_interface import AUTOREGRESSIVE

if TYPE_CHECKING:
    from qvla_export.policies.openvla.policy import OpenVlaPolicy


class OpenVlaFamily(PrismaticFamily[OpenVlaConfig]):
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name = "openvla"
    sizes = tuple(name for name, size in GEOMETRIES.items() if size.inputs.head == "tokens")

    def has_head(self, head: str) -> bool:
        """Whether a head of this name is one of this family's; `load_config` judges others."""
        return head == AUTOREGRESSIVE

    def config(self, checkpoint: Path, preset: str | None) -> OpenVlaConfig:
        """Return what is read of `qvla_policy.json`, of a preset, or assumed."""
        return load_config(checkpoint, preset)

    def with_head(self, inputs: PolicyInputs, config: OpenVlaConfig) -> PolicyInputs:
        """Return what decides the rows of the layers: tokens one after the other."""
        return replace(inputs, head="tokens", autoregressive=True)

    def load(
        self, checkpoint: Path, unnorm_key: str | None, config: OpenVlaConfig, resident: bool
    ) -> "OpenVlaPolicy":
        """Load a checkpoint folder; see `load_openvla_policy`."""
        from qvla_export.policies.openvla.policy import load_openvla_policy

        return load_openvla_policy(checkpoint, unnorm_key, config, resident)

    def require_files(self, checkpoint: Path, config: OpenVlaConfig) -> None:
        """Refuse a folder by its files' names and headers; see `openvla.files.check_files`."""
        check_files(checkpoint)

    def write_random(self, output: Path, geometry: Geometry, on_progress: OnBytes | None) -> None:
        """Write a checkpoint of a geometry with random weights."""
        from qvla_export.policies.openvla.random_checkpoint import write_random_checkpoint

        write_random_checkpoint(output, geometry, on_progress=on_progress)

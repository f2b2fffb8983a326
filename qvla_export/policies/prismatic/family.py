"""What a `Family` of checkpoints of OpenVLA's model type does, whatever their heads."""

import abc
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.policies.adapters import adapter_file, body_folder
from qvla_export.policies.model_type import read_model_type
from qvla_export.policies.prismatic.config import PrismaticConfig
from qvla_export.policies.prismatic.files import merges_on_load
from qvla_export.shared.policy_interface import CONFIG_NAME, head_of, read_policy_config

if TYPE_CHECKING:
    from torch import Tensor


class PrismaticFamily(abc.ABC):
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name: str
    model_type = "openvla"

    def recognizes(self, checkpoint: Path) -> bool:
        """Whether config.json is an OpenVLA's, and its head one of this family's."""
        return read_model_type(checkpoint) == self.model_type and self.has_head(head_of(checkpoint))

    @abc.abstractmethod
    def has_head(self, head: str) -> bool:
        """Whether a head of this name, see `head_of`, is one of this family's."""

    @abc.abstractmethod
    def config(self, checkpoint: Path, preset: str | None) -> PrismaticConfig:
        """Return what is read of `qvla_policy.json`, of a preset, or assumed.

        Raises:
            CheckpointError: nothing says it, or the preset is unknown.
        """

    def describe(self, checkpoint: Path, preset: str | None) -> str:
        """Say in one line what a checkpoint was found to be, and what is assumed of it.

        Raises:
            CheckpointError: as `config`.
        """
        config = self.config(checkpoint, preset)
        stated: set[str] = set()
        if preset is None and (checkpoint / CONFIG_NAME).is_file():
            stated = set(read_policy_config(checkpoint))
        parts = sorted(path.name for path in checkpoint.glob("*.pt"))
        beside = f" with {', '.join(parts)}" if parts else ""
        what = f"{checkpoint}: {self.name}{beside}, {config.horizon} actions of {config.action_dim}"
        if changed := merges_on_load(checkpoint):
            what += f"; an adapter is merged on load into {changed} weights"
            what += f" of {body_folder(checkpoint)}" if adapter_file(checkpoint) else ""
        if preset is not None:
            return f"{what}; as preset {preset} says"
        assumed = [
            f"{field.name} {_shown(getattr(config, field.name))}"
            for field in fields(config)
            if field.name not in stated and getattr(config, field.name) not in ((), None)
        ]
        return f"{what}; assumed: {', '.join(assumed)}" if assumed else what

    def write_smoothed(
        self, checkpoint: Path, output: Path, factors: "Mapping[str, Tensor]", keep_types: bool
    ) -> None:
        """Copy a checkpoint with some parameters multiplied; see `prismatic.smoothing`."""
        from qvla_export.policies.prismatic.smoothing import write_smoothed

        write_smoothed(checkpoint, output, factors, keep_types)


def _shown(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)

"""What a `Family` of checkpoints of OpenVLA's model type does, whatever their heads."""

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import PROMPT_TOKENS, Geometry, find_geometry
from qvla_export.policies.adapters import adapter_file, body_folder
from qvla_export.policies.assumptions import unstated_fields, with_assumptions
from qvla_export.policies.model_type import read_model_type
from qvla_export.policies.prismatic.config import PrismaticConfig
from qvla_export.policies.prismatic.files import merges_on_load
from qvla_export.shared.images import load_image_spec
from qvla_export.shared.policy_interface import CONFIG_NAME, head_of, read_policy_config

if TYPE_CHECKING:
    from torch import Tensor

    from qvla_export.policies.prismatic.policy import PrismaticPolicy

Config = TypeVar("Config", bound=PrismaticConfig)
OnBytes = Callable[[int, int], None]


class PrismaticFamily(abc.ABC, Generic[Config]):
    """See `Family` for the meaning of its members; torch is imported where a checkpoint is."""

    name: str
    model_type = "openvla"
    sizes: tuple[str, ...]

    def recognizes(self, checkpoint: Path) -> bool:
        """Whether config.json is an OpenVLA's, and its head one of this family's."""
        return read_model_type(checkpoint) == self.model_type and self.has_head(head_of(checkpoint))

    @abc.abstractmethod
    def has_head(self, head: str) -> bool:
        """Whether a head of this name, see `head_of`, is one of this family's."""

    @abc.abstractmethod
    def config(self, checkpoint: Path, preset: str | None) -> Config:
        """Return what is read of `qvla_policy.json`, of a preset, or assumed.

        Raises:
            CheckpointError: nothing says it, or the preset is unknown.
        """

    @abc.abstractmethod
    def with_head(self, inputs: PolicyInputs, config: Config) -> PolicyInputs:
        """Return what decides the rows of the layers, with what the head decides of them."""

    @abc.abstractmethod
    def load(
        self, checkpoint: Path, unnorm_key: str | None, config: Config, resident: bool
    ) -> "PrismaticPolicy":
        """Load a checkpoint folder; see `open`."""

    @abc.abstractmethod
    def require_files(self, checkpoint: Path, config: Config) -> None:
        """Refuse a folder by its files' names and headers."""

    @abc.abstractmethod
    def write_random(self, output: Path, geometry: Geometry, on_progress: OnBytes | None) -> None:
        """Write a checkpoint of a geometry with random weights."""

    def describe(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> str:
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
        return with_assumptions(what, unstated_fields(config, stated))

    def inputs(self, checkpoint: Path, preset: str | None) -> PolicyInputs:
        """Return what decides the rows of the layers; reads no weights."""
        config = self.config(checkpoint, preset)
        inputs = PolicyInputs(
            images=len(config.cameras),
            image_size=load_image_spec(checkpoint / "preprocessor_config.json").size,
            prompt_tokens=PROMPT_TOKENS,
            horizon=config.horizon,
            action_dim=config.action_dim,
            state_dim=config.state_dim,
        )
        return self.with_head(inputs, config)

    def can_stay_on_disk(self, checkpoint: Path, preset: str | None) -> bool:
        """Whether weights can be left on disk: not where what is measured needs chosen tokens."""
        return False

    def open(
        self, checkpoint: Path, unnorm_key: str | None, preset: str | None, resident: bool
    ) -> "PrismaticPolicy":
        """Load a checkpoint folder."""
        return self.load(checkpoint, unnorm_key, self.config(checkpoint, preset), resident)

    def check(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> None:
        """Refuse what `open` and the first action would refuse, in the memory of one tensor."""
        config = self.config(checkpoint, preset)
        policy = self.load(checkpoint, unnorm_key, config, resident=False)
        policy.processor.require_tokenizer()
        policy.require_finite()

    def check_files(self, checkpoint: Path, preset: str | None) -> None:
        """Refuse a folder by its files' names and headers; see `require_files`."""
        self.require_files(checkpoint, self.config(checkpoint, preset))

    def write_random_checkpoint(
        self, output: Path, size: str, on_progress: OnBytes | None = None
    ) -> None:
        """Write a checkpoint of a published size with random weights."""
        self.write_random(output, find_geometry(size), on_progress)

    def write_smoothed(
        self, checkpoint: Path, output: Path, factors: "Mapping[str, Tensor]", keep_types: bool
    ) -> None:
        """Copy a checkpoint with some parameters multiplied; see `prismatic.smoothing`."""
        from qvla_export.policies.prismatic.smoothing import write_smoothed

        write_smoothed(checkpoint, output, factors, keep_types)

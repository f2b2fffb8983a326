"""ACT as a `Policy`: load a checkpoint of LeRobot, act."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qvla_export.policies.act.checkpoint import load_module
from qvla_export.policies.act.config import read_act_config
from qvla_export.policies.act.module import ActModule
from qvla_export.policies.base import PolicyBatch, PolicyPart
from qvla_export.policies.lerobot.files import check_files, checkpoint_digest
from qvla_export.policies.prismatic.parts import PartModule
from qvla_export.policies.whole_policy import WholePolicy
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.frames import Channels, FrameSpec
from qvla_export.shared.lerobot.lerobot_config import LeRobotConfig, read_lerobot_config
from qvla_export.shared.lerobot.lerobot_statistics import (
    Normalizer,
    lerobot_statistics,
    read_normalizers,
)
from qvla_export.shared.processor import Processor, ProcessorSpec
from qvla_export.shared.program import Program

_PART = "policy"


@dataclass(frozen=True, repr=False)
class ActPolicy(WholePolicy):
    """A loaded ACT policy; see `Policy` for the meaning of its members."""

    module: ActModule

    def is_quantized(self, name: str) -> bool:
        """Whether a layer is of backbone, encoder or decoder; the others stay in float."""
        return name.startswith(("backbone.", "encoder.", "decoder."))

    def normalized_actions(self, batch: PolicyBatch) -> Tensor:
        """Return normalized actions [B, horizon, dim]."""
        actions: Tensor = self.module(batch.pixel_values, batch.state)
        return actions

    def parts(self, layers_per_part: int | None = None) -> tuple[PolicyPart, ...]:
        """Return the one part.

        Raises:
            CheckpointError: it is to be cut.
        """
        if layers_per_part is not None:
            raise CheckpointError(
                "an ACT policy is one part, it is small enough; leave --layers-per-part out"
            )
        batch = self.probe_batch()
        inputs = {"pixel_values": batch.pixel_values}
        if batch.state is not None:
            inputs["state"] = batch.state
        part = PartModule(self.module, self.module.forward).eval()
        return (PolicyPart(_PART, part, inputs, {"actions": {}}, {}),)

    def program(self, layers_per_part: int | None = None) -> Program:
        """Return the program that runs the part once."""
        return Program.straight(part.name for part in self.parts(layers_per_part))


def load_act_policy(checkpoint: Path, unnorm_key: str | None, preset: str | None) -> ActPolicy:
    """Load an ACT checkpoint folder of LeRobot.

    Args:
        checkpoint: folder with config.json, model.safetensors and, unless it is of the old layout,
            processor files with their statistics.
        unnorm_key: must be None: there is one data set's statistics.
        preset: must be None: config.json says everything.

    Raises:
        CheckpointError, StatisticsError, ArtifactError: what is wrong and what is to be done.
    """
    config = read_lerobot_config(checkpoint, preset)
    check_files(checkpoint, ())
    module, _ = load_module(checkpoint, config)
    before, after = read_normalizers(checkpoint, config, ())
    spec = ProcessorSpec(
        cameras=tuple(config.cameras),
        image=_frames(config, before),
        horizon=read_act_config(config).horizon,
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        language="none",
    )
    statistics = lerobot_statistics(config, before, after, unnorm_key)
    return ActPolicy(module, Processor(spec, statistics), checkpoint_digest(checkpoint, ()))


def _frames(config: LeRobotConfig, before: Normalizer) -> FrameSpec:
    """How pictures are normalized: each camera by its own statistics, never resized."""
    maps = [before.affine(camera.key, "VISUAL", 3) for camera in config.cameras.values()]
    camera = next(iter(config.cameras.values()))
    means: list[Channels] = [(m.center[0], m.center[1], m.center[2]) for m in maps]
    stds: list[Channels] = [(m.divisor[0], m.divisor[1], m.divisor[2]) for m in maps]
    return FrameSpec(camera.height, camera.width, "none", tuple(means), tuple(stds))

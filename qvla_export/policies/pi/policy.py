"""pi0 and pi0.5 as a `Policy`: load a checkpoint, integrate the flow, act."""

from dataclasses import dataclass
from pathlib import Path

from qvla_export.policies.flow.policy import FlowPolicy
from qvla_export.policies.pi.checkpoint import load_module
from qvla_export.policies.pi.config import PiConfig, load_config
from qvla_export.policies.pi.loading import checkpoint_digest, load_processor
from qvla_export.policies.pi.module import PiModule
from qvla_export.policies.pi.smoothing import find_migrations
from qvla_export.policies.smoothing import Migration


@dataclass(frozen=True, repr=False)
class PiPolicy(FlowPolicy):
    """A loaded pi0 or pi0.5 policy; see `Policy` for the meaning of its members."""

    module: PiModule
    config: PiConfig

    def is_quantized(self, name: str) -> bool:
        """Whether a layer is of the tower or of a stack of blocks; adaptive norms are not."""
        return super().is_quantized(name) and not name.endswith(".dense")

    def migrations(self) -> tuple[Migration, ...]:
        """Return where the network can be smoothed."""
        return find_migrations(self.module.arch)


def load_pi_policy(
    checkpoint: Path, unnorm_key: str | None = None, config: PiConfig | None = None
) -> PiPolicy:
    """Load a pi0 or pi0.5 checkpoint folder of openpi's or LeRobot's layout.

    Args:
        checkpoint: folder with config.json, weights, statistics and tokenizer.json.
        unnorm_key: data set whose statistics are used (openpi's asset); None if only one.
        config: what the policy sees and returns; None reads it from the folder.

    Raises:
        CheckpointError, StatisticsError: what is wrong and what is available.
    """
    config = config or load_config(checkpoint, None, unnorm_key)
    module, _ = load_module(checkpoint, config.vision_heads, config.flow)
    processor = load_processor(checkpoint, config, module.arch, unnorm_key)
    digest = checkpoint_digest(checkpoint, config, processor.statistics.key)
    return PiPolicy(module, processor, digest, config)


def check_pi_checkpoint(checkpoint: Path, unnorm_key: str | None, config: PiConfig) -> None:
    """Refuse what `load_pi_policy` would refuse, in the memory of one tensor.

    Raises:
        CheckpointError, StatisticsError: as `load_pi_policy`.
    """
    module, weights = load_module(checkpoint, config.vision_heads, config.flow, resident=False)
    load_processor(checkpoint, config, module.arch, unnorm_key)
    weights.require_finite()

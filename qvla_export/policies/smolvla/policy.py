"""SmolVLA as a `Policy`: load a checkpoint of LeRobot, integrate the flow, act."""

from dataclasses import dataclass
from pathlib import Path

from qvla_export.policies.flow.policy import FlowPolicy
from qvla_export.policies.lerobot.files import check_files, checkpoint_digest
from qvla_export.policies.smolvla.checkpoint import load_module
from qvla_export.policies.smolvla.config import (
    STEPS,
    TOKENIZER,
    SmolVlaConfig,
    read_smolvla_config,
    read_vlm_config,
    vlm_folder,
)
from qvla_export.policies.smolvla.module import SmolVlaModule
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.frames import FrameSpec
from qvla_export.shared.inputs.noise import NoiseSpec
from qvla_export.shared.json_documents import Node
from qvla_export.shared.lerobot.lerobot_config import LeRobotConfig, read_lerobot_config
from qvla_export.shared.lerobot.lerobot_statistics import (
    PREPROCESSOR,
    has_processors,
    lerobot_statistics,
    read_normalizers,
    read_steps,
)
from qvla_export.shared.processor import Processor, ProcessorSpec, load_tokenizer


@dataclass(frozen=True, repr=False)
class SmolVlaPolicy(FlowPolicy):
    """A loaded SmolVLA policy; see `Policy` for the meaning of its members."""

    module: SmolVlaModule


def load_smolvla_policy(
    checkpoint: Path, unnorm_key: str | None, preset: str | None
) -> SmolVlaPolicy:
    """Load a SmolVLA checkpoint folder of LeRobot.

    Args:
        checkpoint: folder with config.json, model.safetensors and processor files; the VLM's
            config.json and tokenizer.json in `vlm/` there or beside it.
        unnorm_key: must be None: there is one data set's statistics.
        preset: must be None: config.json says everything.

    Raises:
        CheckpointError, StatisticsError, ArtifactError: what is wrong and what is to be done.
    """
    config = read_lerobot_config(checkpoint, preset)
    own = read_smolvla_config(config)
    check_files(checkpoint, STEPS)
    folder = vlm_folder(checkpoint, config)
    module, _ = load_module(checkpoint, own, read_vlm_config(folder))
    before, after = read_normalizers(checkpoint, config, STEPS)
    if before.modes.get("VISUAL") != "IDENTITY":
        raise CheckpointError(
            f"{checkpoint}: pictures must not be normalized by statistics (VISUAL: IDENTITY), the "
            f"processor says {before.modes.get('VISUAL')!r}, which is not built here"
        )
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if tokenizer.get_vocab_size() > module.arch.vocab_size:
        raise CheckpointError(
            f"{folder / TOKENIZER} has {tokenizer.get_vocab_size()} tokens, the network "
            f"{module.arch.vocab_size}; it is another VLM's"
        )
    spec = _spec(config, own, _tokens(checkpoint, config))
    statistics = lerobot_statistics(config, before, after, unnorm_key)
    digest = checkpoint_digest(checkpoint, STEPS, [folder / "config.json", folder / TOKENIZER])
    return SmolVlaPolicy(module, Processor(spec, statistics, tokenizer), digest)


def _spec(config: LeRobotConfig, own: SmolVlaConfig, tokens: int) -> ProcessorSpec:
    half, count = (0.5, 0.5, 0.5), len(config.cameras)
    width, height = own.picture
    return ProcessorSpec(
        cameras=tuple(config.cameras),
        image=FrameSpec(height, width, "pad-left-top", (half,) * count, (half,) * count),
        horizon=own.horizon,
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        max_prompt_tokens=tokens,
        language="line",
        state_width=own.state_width,
        noise=NoiseSpec("noise", (own.horizon, own.action_width)),
    )


def _tokens(checkpoint: Path, config: LeRobotConfig) -> int:
    """Tokens that an instruction is cut to: the tokenizer step's, or config.json's."""
    stated = config.node.field("tokenizer_max_length")
    if has_processors(checkpoint):
        steps = read_steps(checkpoint, PREPROCESSOR, STEPS)
        found = [step.config for step in steps if step.name == "tokenizer_processor"]
        if len(found) == 1:
            _require_plain(found[0])
            stated = found[0].field("max_length")
    return stated.whole(1, 4096)


def _require_plain(step: Node) -> None:
    """Refuse what changes which tokens there are, or where: padding changes neither."""
    for name, value in (("padding_side", "right"), ("truncation", True)):
        if step.field(name).value != value:
            raise step.field(name).wrong(f"{value!r} is computed here")

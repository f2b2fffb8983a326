"""What is read of a pi0 or pi0.5 checkpoint folder beside its weights."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from qvla_export.policies.lerobot.files import state_files
from qvla_export.policies.pi.architecture import PiArchitecture
from qvla_export.policies.pi.config import PiConfig
from qvla_export.policies.pi.lerobot import STEPS, is_lerobot_pi, read_statistics
from qvla_export.shared.artifacts import sha256_tree
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.frames import FrameSpec
from qvla_export.shared.inputs.noise import NoiseSpec
from qvla_export.shared.normalization import Affine, Statistics
from qvla_export.shared.openpi.openpi_files import is_openpi, openpi_statistics
from qvla_export.shared.processor import Processor, ProcessorSpec, load_tokenizer

TOKENIZER = "tokenizer.json"
_BOS = "<bos>"
# Bins over [-1, 1] that a state's numbers become in pi0.5's prompt.
_STATE_BINS = 256


def load_processor(
    checkpoint: Path, config: PiConfig, arch: PiArchitecture, unnorm_key: str | None
) -> Processor:
    """Read statistics and tokenizer.

    Args:
        checkpoint: the folder.
        config: cameras, chunk, dimensions, prompt.
        arch: the network, which the dimensions must fit into.
        unnorm_key: data set whose statistics to use; may be None where there is one.

    Raises:
        CheckpointError, StatisticsError: what is wrong and what is available.
    """
    _require_fitting(checkpoint, config, arch)
    path = checkpoint / TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {TOKENIZER}, which neither openpi nor LeRobot stores: copy that "
            "of google/paligemma-3b-pt-224 beside config.json"
        )
    tokenizer = load_tokenizer(path)
    bos = tokenizer.token_to_id(_BOS)
    if bos is None or tokenizer.get_vocab_size() > arch.vocab_size:
        raise CheckpointError(
            f"{path} does not fit the network: it must have a token {_BOS} and at most "
            f"{arch.vocab_size} tokens, it has {tokenizer.get_vocab_size()}; copy PaliGemma's"
        )
    half, side = (0.5, 0.5, 0.5), arch.image_side
    count = len(config.cameras)
    spec = ProcessorSpec(
        cameras=config.cameras,
        image=FrameSpec(side, side, config.resize, (half,) * count, (half,) * count),
        horizon=config.horizon,
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        bos_token_id=bos,
        prompt=config.prompt,
        max_prompt_tokens=config.max_prompt_tokens,
        language=config.language,
        state_width=config.prompt_state_width if arch.adaptive else arch.state_width,
        state_bins=_STATE_BINS if arch.adaptive else 0,
        optional_cameras=config.optional_cameras,
        joints=config.joints,
        noise=NoiseSpec("noise", (config.horizon, arch.action_width), seed=config.noise_seed),
    )
    return Processor(spec, _statistics(checkpoint, config, unnorm_key), tokenizer)


def checkpoint_digest(checkpoint: Path, config: PiConfig, unnorm_key: str) -> str:
    """Return the SHA-256 over all that decides actions: files read, configuration, statistics."""
    patterns = ("model*.safetensors*", "policy_*processor.json", "assets/**/norm_stats.json")
    names = [p.relative_to(checkpoint).as_posix() for n in patterns for p in checkpoint.glob(n)]
    if is_lerobot_pi(checkpoint):
        names += [path.name for path in state_files(checkpoint, STEPS)]
    files = sha256_tree(checkpoint, sorted({*names, "config.json", TOKENIZER}))
    identity = {"files": files, "config": asdict(config), "unnorm_key": unnorm_key}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _statistics(checkpoint: Path, config: PiConfig, unnorm_key: str | None) -> Statistics:
    if not is_openpi(checkpoint):
        return read_statistics(checkpoint, unnorm_key)
    sizes = (config.action_dim, config.state_dim)
    found = openpi_statistics(checkpoint, unnorm_key, config.adaptive, sizes)
    assert isinstance(found.action, Affine)
    return replace(found, action=config.joints.robot_limits(found.action))


def _require_fitting(checkpoint: Path, config: PiConfig, arch: PiArchitecture) -> None:
    if config.image_side not in (0, arch.image_side):
        raise CheckpointError(
            f"{checkpoint}: config.json says images of {config.image_side} pixels, the weights' "
            f"positions are of {arch.image_side}; bring the files of one checkpoint together"
        )
    state_width = arch.state_width or config.state_dim
    if config.action_dim > arch.action_width or config.state_dim > state_width:
        raise CheckpointError(
            f"{checkpoint}: actions of {config.action_dim} and states of {config.state_dim} "
            f"numbers do not fit into the network's {arch.action_width} and {state_width}; correct "
            "action_dim and state_dim"
        )

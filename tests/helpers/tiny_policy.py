"""A tiny untrained OpenVLA-OFT policy: its sizes, its settings and its checkpoint."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.new_checkpoint import new_module, save_checkpoint
from qvla_export.policies.prismatic.new_checkpoint import (
    BOS_ID,
    STOP_ID,
    SUFFIX_ID,
    NetworkSize,
    train_tokenizer,
)
from qvla_export.shared.observation import Observation

TINY_SIZE = NetworkSize(
    image_size=28,
    patch_size=14,
    vision_dim=64,
    vision_depth=3,
    hidden_dim=64,
    mlp_dim=128,
    depth=2,
    heads=2,
    vocab_size=300,
)
TINY_CONFIG = OftConfig(
    cameras=("image",),
    horizon=4,
    action_dim=4,
    state_dim=4,
    normalization="q99",
    vision_heads=(2, 2),
    bos_token_id=BOS_ID,
    stop_token_id=STOP_ID,
    suffix_token_id=SUFFIX_ID,
)
# The second instruction is longer than the first, so that batches are ragged.
TINY_INSTRUCTIONS = ("push the button", "open the small drawer slowly", "close the window")


def make_all_count(module: nn.Module) -> None:
    """Scale every weight so that outputs are as large as inputs: each layer counts for the end."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.mul_(weight[0].numel() ** -0.5 / weight.std())


def write_tiny_checkpoint(
    path: Path, seed: int = 0, config: OftConfig = TINY_CONFIG, size: NetworkSize = TINY_SIZE
) -> Path:
    """Write a whole checkpoint folder; the same seed gives the same bytes."""
    tokenizer = train_tokenizer(TINY_INSTRUCTIONS, size.vocab_size)
    bounds = {"q01": [-1.0] * 4, "q99": [1.0] * 4, "min": [-1.0] * 4, "max": [1.0] * 4}
    statistics = {"tiny": {"action": {**bounds, "mask": [True] * 4}, "proprio": bounds}}
    module = new_module(size, config, seed)
    save_checkpoint(path, module, config, tokenizer, statistics, step=0)
    return path


def tiny_observations(count: int, seed: int = 0) -> list[Observation]:
    """Return random observations that the tiny policy takes."""
    generator = np.random.default_rng(seed)
    return [
        Observation(
            images={"image": generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)},
            instruction=TINY_INSTRUCTIONS[i % len(TINY_INSTRUCTIONS)],
            state=generator.uniform(-1, 1, 4).astype(np.float32),
        )
        for i in range(count)
    ]

"""Golden cases of upstream UniVLA, wherever they lie, and tiny checkpoints of the same family."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openvla_cases import INSTRUCTIONS
from oracles import oracle_root
from tiny_policy import TINY_SIZE, make_all_count

from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.prismatic.new_checkpoint import (
    BOS_ID,
    SUFFIX_ID,
    save_checkpoint,
)
from qvla_export.policies.prismatic.state_files import read_state_file
from qvla_export.policies.univla.action_decoder import ActionDecoder
from qvla_export.policies.univla.architecture import DecoderShape
from qvla_export.policies.univla.checkpoint import save_module
from qvla_export.policies.univla.config import UniVlaConfig
from qvla_export.policies.univla.new_checkpoint import latent_tokenizer, new_module
from qvla_export.policies.univla.policy import UniVlaPolicy, load_univla_policy

HORIZON, DIM, CODEBOOK = 12, 7, 32


def _holds(path: Path, *names: str) -> bool:
    with np.load(path) as archive:
        return set(names) <= set(archive.files)


_FILES = sorted(oracle_root().glob("univla*/*.npz"))
# Names and sizes vary: a case is what holds inputs and a chunk, an episode what holds states.
CASES = [path for path in _FILES if _holds(path, "pixel_values", "decoder_chunk")]
EPISODES = [path for path in _FILES if _holds(path, "latent_action", "visual_embed", "action")]
CASE_IDS = [f"{case.parent.name}-{case.stem}" for case in CASES]


def _action_dim(folder: Path) -> int:
    """Read how many numbers an action has off a chunk that lies there."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as archive:
            for name in ("decoder_chunk", "chunk"):
                if name in archive.files:
                    return int(archive[name].shape[-1])
    raise AssertionError(f"no chunk in {folder}")


def load_oracle(folder: Path) -> UniVlaPolicy:
    """Load an oracle's checkpoint with the numbers of heads that its weights do not show."""
    tiny = json.loads((folder / "timm_tiny_models.json").read_text())
    decoder = tiny.pop("action_decoder")
    heads = {("dino" in name): tower["num_heads"] for name, tower in tiny.items()}
    config = UniVlaConfig(
        cameras=("full_image",),
        horizon=decoder["window_size"],
        action_dim=_action_dim(folder),
        state_dim=0,
        normalization="q99",
        vision_heads=(heads[True], heads[False]),
        decoder_heads=decoder["n_heads"],
    )
    return load_univla_policy(folder / "checkpoint", None, config)


def load_decoder(folder: Path) -> ActionDecoder:
    """Load an oracle's action decoder alone."""
    tiny = json.loads((folder / "timm_tiny_models.json").read_text())["action_decoder"]
    width = tiny["embed_dim"]
    shape = DecoderShape(width, tiny["n_heads"], round(tiny["mlp_ratio"] * width))
    decoder = ActionDecoder(tiny["vis_dim"], shape, tiny["window_size"], _action_dim(folder))
    decoder.load_state_dict(read_state_file(folder / "checkpoint" / "action_decoder.pt"))
    return decoder.eval()


class Case:
    """One golden case and the policy that must reproduce it."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.golden = dict(archive)
        self.policy = load_oracle(path.parent)

    def batch(self) -> PolicyBatch:
        ids = self.golden["input_ids"]
        suffix = self.policy.config.suffix_token_id
        if ids[0, -1] != suffix:
            ids = np.append(ids, [[suffix]], axis=1)
        pixels = torch.from_numpy(self.golden["pixel_values"])
        return PolicyBatch(pixels, torch.from_numpy(ids), None, None)


def write_tiny_univla(path: Path, seed: int = 0, **stated: Any) -> Path:
    """Write a seeded, untrained checkpoint whose every layer counts for the actions."""
    config = UniVlaConfig(
        cameras=("full_image",),
        horizon=HORIZON,
        action_dim=DIM,
        state_dim=0,
        normalization="q99",
        vision_heads=(2, 2),
        bos_token_id=BOS_ID,
        suffix_token_id=SUFFIX_ID,
        decoder_heads=4,
        **stated,
    )
    module = new_module(TINY_SIZE, config, seed)
    make_all_count(module)
    with torch.no_grad():
        module.language_model.lm_head.weight.mul_(3)
    limits = {"q01": [-1.0] * DIM, "q99": [1.0] * DIM}
    statistics = {"tiny": {"action": {**limits, "mask": [True] * (DIM - 1) + [False]}}}
    tokenizer = latent_tokenizer(INSTRUCTIONS, TINY_SIZE, CODEBOOK)
    save_checkpoint(path, partial(save_module, module), module.arch, config, tokenizer, statistics)
    return path

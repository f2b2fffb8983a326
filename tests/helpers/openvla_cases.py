"""Golden cases of upstream OpenVLA, wherever they lie, and tiny checkpoints of the same family."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from oracles import oracle_root
from safetensors.torch import load_file
from tiny_policy import TINY_INSTRUCTIONS, TINY_SIZE, make_all_count

from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.openvla.checkpoint import save_module
from qvla_export.policies.openvla.config import OpenVlaConfig
from qvla_export.policies.openvla.new_checkpoint import new_module
from qvla_export.policies.openvla.policy import OpenVlaPolicy, load_openvla_policy
from qvla_export.policies.prismatic.new_checkpoint import (
    BOS_ID,
    SUFFIX_ID,
    save_checkpoint,
    train_tokenizer,
)
from qvla_export.shared.observation import Observation

_SIZE = replace(TINY_SIZE, vocab_size=600)
INSTRUCTIONS = TINY_INSTRUCTIONS


def _is_case(path: Path) -> bool:
    with np.load(path) as archive:
        return {"pixel_values", "generated_token_ids"} <= set(archive.files)


FOLDER = oracle_root()
# Folders, sizes and names vary: a case is what holds inputs and tokens.
CASES = sorted(p for p in FOLDER.glob("openvla*/*.npz") if _is_case(p))
CASE_IDS = [f"{case.parent.name}-{case.stem}" for case in CASES]


class Case:
    """One golden case and the policy that must reproduce it."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.golden = dict(archive)
        self.checkpoint = path.parent / "checkpoint"
        self.policy = self.load(self.checkpoint)

    def load(self, checkpoint: Path, unnorm_key: str | None = None) -> OpenVlaPolicy:
        towers = json.loads((self.checkpoint.parent / "timm_tiny_models.json").read_text())
        heads = {("dino" in name): tower["num_heads"] for name, tower in towers.items()}
        config = OpenVlaConfig(
            cameras=("full_image",),
            horizon=1,
            action_dim=len(self.golden["generated_token_ids"]),
            state_dim=0,
            normalization="q99",
            vision_heads=(heads[True], heads[False]),
            suffix_token_id=int(self.golden["input_ids_with_29871"][0, -1]),
        )
        return load_openvla_policy(checkpoint, unnorm_key, config)

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.golden[name])

    def batch(self, ids: str = "input_ids_with_29871") -> PolicyBatch:
        return PolicyBatch(self.tensor("pixel_values"), self.tensor(ids), None, None)


def copied(checkpoint: Path, to: Path, without: str = "") -> Path:
    """Copy a checkpoint so that it can be changed, without one file."""
    shutil.copytree(checkpoint, to, ignore=shutil.ignore_patterns(without) if without else None)
    for path in (to, *to.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return to


def stored_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(checkpoint / "model.safetensors")
    return weights


def write_tiny_openvla(path: Path, seed: int = 0) -> Path:
    """Write a seeded, untrained checkpoint whose every layer counts for the tokens."""
    config = OpenVlaConfig(
        cameras=("full_image",),
        horizon=1,
        action_dim=7,
        state_dim=0,
        normalization="q99",
        vision_heads=(2, 2),
        bos_token_id=BOS_ID,
        suffix_token_id=SUFFIX_ID,
    )
    module = new_module(_SIZE, config, seed)
    make_all_count(module)
    with torch.no_grad():
        module.language_model.lm_head.weight.mul_(3)
    limits = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    statistics = {"tiny": {"action": {**limits, "mask": [True] * 6 + [False]}}}
    tokenizer = train_tokenizer(INSTRUCTIONS, 300)
    save_checkpoint(path, partial(save_module, module), module.arch, config, tokenizer, statistics)
    return path


def openvla_observations(count: int, seed: int = 0) -> list[Observation]:
    generator = np.random.default_rng(seed)
    return [
        Observation(
            {"full_image": generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)},
            INSTRUCTIONS[i % len(INSTRUCTIONS)],
        )
        for i in range(count)
    ]

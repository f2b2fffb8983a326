"""Golden cases of LeRobot's SmolVLA, wherever they lie, and a tiny checkpoint of its layout."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lerobot_cases import small_features
from openvla_cases import FOLDER

from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.prismatic.new_checkpoint import train_tokenizer
from qvla_export.policies.smolvla.new_checkpoint import SmolVlaSize, new_module, save_checkpoint
from qvla_export.policies.smolvla.policy import SmolVlaPolicy, load_smolvla_policy
from qvla_export.shared.observation import Observation

ORACLE = FOLDER / "smolvla"
# None where the weights, which are not in the repository, do not lie.
_WHOLE = (ORACLE / "checkpoint/model.safetensors").exists()
CASES = sorted(ORACLE.glob("case*.npz")) if _WHOLE else []
CAMERAS = ("top", "wrist")
STATE, ACTION, HORIZON, STEPS = 6, 4, 5, 3
INSTRUCTIONS = ("push the button", "open the small drawer slowly", "close the window")
_SIZE = SmolVlaSize(
    image_size=32,
    patch_size=8,
    vision_dim=16,
    vision_mlp=32,
    vision_heads=2,
    language_dim=24,
    language_mlp=40,
    expert_dim=16,
    expert_mlp=32,
    depth=3,
    head_dim=6,
    action_width=8,
    horizon=HORIZON,
    flow_steps=STEPS,
)


class SmolVlaCase:
    """One golden case and the policy that must reproduce it."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.golden = dict(archive)
        self.policy: SmolVlaPolicy = load_smolvla_policy(path.parent / "checkpoint", None, None)

    def observations(self) -> list[Observation]:
        golden = self.golden
        return [
            Observation(
                {n: golden[f"image_{n}"][i] for n in CAMERAS}, str(golden["task"][i]), state
            )
            for i, state in enumerate(golden["state"])
        ]

    def batch(self) -> PolicyBatch:
        """Return the case with its noise, and with the cameras that it masks."""
        mask = np.stack([self.golden[f"image_mask_{name}"] for name in CAMERAS], axis=1)
        return replace(
            self.policy.batch(self.observations()),
            noise=torch.from_numpy(self.golden["noise"]),
            image_mask=None if mask.all() else torch.from_numpy(mask),
        )


def write_tiny_smolvla(path: Path, seed: int = 0) -> Path:
    """Write a seeded, untrained checkpoint of LeRobot's layout whose every layer counts."""
    tokenizer = train_tokenizer(INSTRUCTIONS, 300)
    module = new_module(replace(_SIZE, vocab_size=tokenizer.get_vocab_size()), seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:  # outputs as large as inputs
                weight.normal_(0, weight[0].numel() ** -0.5)
    generator = np.random.default_rng(seed)
    tables = {}
    for name, size in (("action", ACTION), ("observation.state", STATE)):
        mean, std = generator.normal(0, 0.3, size), generator.uniform(0.5, 1.5, size)
        tables[name] = {"mean": mean, "std": std, "min": mean - 3 * std, "max": mean + 3 * std}
    features = small_features(STATE, ACTION, cameras=CAMERAS, visual="IDENTITY")
    save_checkpoint(path, module, HORIZON, features, tokenizer, tables)
    return path


def smolvla_observations(count: int, seed: int = 0) -> list[Observation]:
    generator = np.random.default_rng(seed)
    return [
        Observation(
            {n: generator.integers(0, 256, (24, 20, 3), dtype=np.uint8) for n in CAMERAS},
            INSTRUCTIONS[i % len(INSTRUCTIONS)],
            generator.normal(0, 1, STATE).astype(np.float32),
        )
        for i in range(count)
    ]

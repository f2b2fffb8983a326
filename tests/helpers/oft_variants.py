"""Golden cases of OpenVLA-OFT with FiLM and with a diffusion head, each a checkpoint of its own."""

import shutil
from pathlib import Path

import numpy as np
import torch
from places import DATA

from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy

# Made for this repository: not among other golden data that the tests may be pointed to.
FOLDER = DATA / "oracles" / "oft_film_diffusion"
CASES = sorted(FOLDER.glob("case_*.npz"))
CASE_IDS = [path.stem.removeprefix("case_") for path in CASES]


class Variant:
    """One golden case, its checkpoint and the policy that must reproduce it."""

    def __init__(self, path: Path, folder: Path) -> None:
        with np.load(path) as archive:
            self.golden = dict(archive)
        self.steps = int(self.golden.get("steps", 0))
        self.film = "film" in path.stem
        self.checkpoint = shutil.copytree(FOLDER / "checkpoint", folder / path.stem)
        for part in (FOLDER / "parts").iterdir():
            if self._has(part.name):
                name = part.name.removeprefix("l1--").removeprefix("diffusion--")
                shutil.copy(part, self.checkpoint / name)
        self.policy: OftPolicy = load_oft_policy(self.checkpoint, None, self.config())

    def _has(self, part: str) -> bool:
        if part.startswith("vision_backbone"):
            return self.film
        if part.startswith("proprio"):
            return "proprio_raw" in self.golden
        return part.startswith("l1--") if not self.steps else not part.startswith(("l1--", "prop"))

    def config(self) -> OftConfig:
        horizon, action_dim = self.golden["actions"].shape
        return OftConfig(
            cameras=tuple(f"camera_{i}" for i in range(self.golden["pixel_values"].shape[1] // 6)),
            horizon=horizon,
            action_dim=action_dim,
            state_dim=len(self.golden["proprio_raw"]) if "proprio_raw" in self.golden else 0,
            normalization="q99",
            head="diffusion" if self.steps else "l1",
            vision_heads=(2, 2),
            suffix_token_id=int(self.golden["input_ids_with_suffix"][0, -1]),
            diffusion_steps=self.steps or 50,
        )

    def feeds(self) -> dict[str, np.ndarray]:
        """Return the model's inputs by name."""
        feeds = {
            "pixel_values": self.golden["pixel_values"],
            "input_ids": self.golden["input_ids_with_suffix"],
        }
        if "proprio_raw" in self.golden:
            feeds["state"] = self.golden["proprio_normalized"].astype(np.float32)[None]
        if self.steps:
            feeds["noise"] = self.golden["noise"]
        return feeds

    def batch(self) -> PolicyBatch:
        tensors = {name: torch.from_numpy(value) for name, value in self.feeds().items()}
        pixels, ids = tensors["pixel_values"], tensors["input_ids"]
        state, noise = tensors.get("state"), tensors.get("noise")
        return PolicyBatch(pixels, ids, None, state, noise=noise)

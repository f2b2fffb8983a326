"""Golden cases of upstream pi0 and pi0.5, wherever they lie."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from places import DATA, ROOT

from qvla_export.policies.pi.checkpoint import load_module
from qvla_export.policies.pi.flow import FlowSpec
from qvla_export.policies.pi.module import PiModule, PrefixInputs


def _root() -> Path:
    committed, shared = DATA / "oracles", ROOT.parent / "shared" / "oracles"
    named = os.environ.get("QVLA_ORACLES")
    return next(f for f in (Path(named) if named else shared, committed) if f.is_dir())


FOLDER = _root()
# Folders, sizes and names vary: a case is what holds a flow.
CASES = sorted(p for p in FOLDER.glob("pi0*/*.npz") if "v_t" in np.load(p).files)
CASE_IDS = [f"{case.parent.name}-{case.stem}" for case in CASES]
SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


class Case:
    """One golden case and the network that must reproduce it."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.golden: dict[str, Any] = dict(archive)
        self.path = path
        self.checkpoint = path.parent / "checkpoint"
        self.lerobot = "lang_tokens" in self.golden

    def vision_heads(self) -> int:
        found = [*self.checkpoint.parent.rglob("tiny_variants.json")]
        variants = json.loads(found[0].read_text())
        return int(variants["vision"]["num_attention_heads"])

    def module(self) -> PiModule:
        steps = int(self.golden["num_steps"])
        flow = FlowSpec(steps, "computed" if self.lerobot else "accumulated")
        return load_module(self.checkpoint, self.vision_heads(), flow)[0]

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.golden[name])

    def inputs(self, module: PiModule) -> PrefixInputs:
        """What upstream's network was given, from its own preprocessing."""
        if self.lerobot:
            images = torch.cat(list(self.tensor("images_prepared")), dim=1)
            mask = self.tensor("image_masks").T
            ids, seen = self.tensor("lang_tokens"), self.tensor("lang_masks")
            state = self.tensor("state_normalized")
        else:
            frames = [self.tensor(f"image_{name}").permute(0, 3, 1, 2) for name in SLOTS]
            images = torch.cat(frames, dim=1).float() / 255 * 2 - 1
            mask = torch.stack([self.tensor(f"image_mask_{name}") for name in SLOTS], dim=1)
            ids, seen = self.tensor("tokenized_prompt"), self.tensor("tokenized_prompt_mask")
            state = self.tensor("state")
        width = module.arch.state_width
        state = torch.nn.functional.pad(state, (0, width - state.shape[1])) if width else None
        return PrefixInputs(images, ids, state, mask, seen.sum(dim=1))

"""Golden cases of upstream pi0 and pi0.5, wherever they lie."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openvla_cases import copied
from oracles import oracle_root
from tiny_policy import make_all_count

from qvla_export.policies.flow.module import PrefixInputs
from qvla_export.policies.flow.new_checkpoint import FlowSize
from qvla_export.policies.flow.spec import FlowSpec
from qvla_export.policies.pi.checkpoint import load_module
from qvla_export.policies.pi.config import PROMPT, PROMPT_TOKENS, PiConfig
from qvla_export.policies.pi.module import PiModule
from qvla_export.policies.pi.new_checkpoint import new_module, save_checkpoint, train_tokenizer
from qvla_export.shared.observation import Observation

FOLDER = oracle_root()
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


def folder_of(case: Case, to: Path) -> Path:
    """Copy a checkpoint and add what upstream takes from elsewhere, and what nothing says."""
    folder = copied(case.checkpoint, to)
    donor = next(FOLDER.glob("pi0*/tokenizer/tokenizer.json"))
    own = case.path.parent / "tokenizer" / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes((own if own.is_file() else donor).read_bytes())
    stated: dict[str, Any] = {"vision_heads": case.vision_heads()}
    stated["optional_cameras"] = ["base_0_rgb"] if case.lerobot else list(SLOTS[1:])
    if not case.lerobot:
        stated["flow_steps"] = int(case.golden["num_steps"])
        width = case.golden["noise"].shape[2]
        asset = folder / "assets" / _ASSET
        asset.mkdir(parents=True)
        table = {"state": _table(case.golden["state"].shape[1]), "actions": _table(width)}
        (asset / "norm_stats.json").write_text(json.dumps({"norm_stats": table}))
    (folder / "qvla_policy.json").write_text(json.dumps(stated))
    return folder


_SIZE = FlowSize(image_size=28, vision_depth=1, depth=2, heads=2, head_dim=32)
INSTRUCTIONS = ("push the button", "open the small_drawer slowly", "close the window")
_ASSET = "tiny"


def write_tiny_pi(path: Path, adaptive: bool = False, seed: int = 0, **config: Any) -> Path:
    """Write a seeded, untrained checkpoint whose every layer counts for the actions."""
    stated = PiConfig(
        **{
            "cameras": SLOTS[:2],
            "horizon": 4,
            "action_dim": 7,
            "state_dim": 8,
            "normalization": "files",
            "adaptive": adaptive,
            "vision_heads": 4,
            "flow_steps": 4,
            "prompt": PROMPT[adaptive],
            "max_prompt_tokens": PROMPT_TOKENS[adaptive],
            **config,
        }
    )
    module = new_module(_SIZE, stated, seed)
    make_all_count(module)
    with torch.no_grad():
        _calm(module)
    table = {"state": _table(stated.state_dim), "actions": _table(stated.action_dim)}
    statistics = {_ASSET: table}
    tokenizer = train_tokenizer([*INSTRUCTIONS, "Task: , State: 0 1 255;\nAction: "], 400)
    save_checkpoint(path, module, stated, tokenizer, statistics)
    return path


def _calm(module: PiModule) -> None:
    """Make the flow lead most of the noise away, as a trained one does: actions stay near 0."""
    for name, weight in module.named_parameters():
        if name.endswith(("down_proj.weight", "o_proj.weight")) and "expert" in name:
            weight.mul_(0.3)
    if not module.arch.adaptive:  # an MLP lies between
        return
    module.action_expert.norm.dense.weight.mul_(0.1)
    width, action = module.arch.expert.width, module.arch.action_width
    basis, _ = torch.linalg.qr(torch.randn(width, action, generator=torch.manual_seed(1)))
    module.action_in_proj.weight.copy_(basis)
    # A normed vector has the length sqrt(width), noise sqrt(action).
    module.action_out_proj.weight.copy_(basis.T * (action / width) ** 0.5)


def _table(size: int) -> dict[str, list[float]]:
    spread = np.linspace(0.5, 2, size)
    return {
        "mean": np.linspace(-0.2, 0.2, size).tolist(),
        "std": spread.tolist(),
        "q01": (-4 * spread).tolist(),
        "q99": (4 * spread).tolist(),
    }


def pi_observations(
    count: int, seed: int = 0, cameras: Sequence[str] = SLOTS[:2]
) -> list[Observation]:
    generator = np.random.default_rng(seed)
    return [
        Observation(
            {n: generator.integers(0, 256, (48, 64, 3), dtype=np.uint8) for n in cameras},
            INSTRUCTIONS[i % len(INSTRUCTIONS)],
            generator.normal(size=8).astype(np.float32),
        )
        for i in range(count)
    ]

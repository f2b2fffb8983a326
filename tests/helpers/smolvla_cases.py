"""Golden cases of LeRobot's SmolVLA, wherever they lie, and a tiny checkpoint of its layout."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot_cases import lerobot_folder, write_statistics
from openvla_cases import FOLDER
from safetensors.torch import save_file
from transformers import SiglipVisionConfig

from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.flow.architecture import StackSize
from qvla_export.policies.flow.spec import FlowSpec
from qvla_export.policies.prismatic.new_checkpoint import train_tokenizer
from qvla_export.policies.smolvla.architecture import SmolVlaArchitecture
from qvla_export.policies.smolvla.checkpoint import upstream_name
from qvla_export.policies.smolvla.module import SmolVlaModule
from qvla_export.policies.smolvla.policy import SmolVlaPolicy, load_smolvla_policy
from qvla_export.shared.observation import Observation

ORACLE = FOLDER / "smolvla"
# None where the weights, which are not in the repository, do not lie.
_WHOLE = (ORACLE / "checkpoint/model.safetensors").exists()
CASES = sorted(ORACLE.glob("case*.npz")) if _WHOLE else []
CAMERAS = ("top", "wrist")
STATE, ACTION, HORIZON, WIDTH, STEPS = 6, 4, 5, 8, 3
INSTRUCTIONS = ("push the button", "open the small drawer slowly", "close the window")


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
    arch = _architecture(tokenizer.get_vocab_size())
    more: dict[str, Any] = {
        "type": "smolvla",
        "n_obs_steps": 1,
        "adapt_to_pi_aloha": False,
        "use_delta_joint_actions_aloha": False,
        "add_image_special_tokens": False,
        "attention_mode": "cross_attn",
        "num_vlm_layers": arch.language.depth,
        "num_expert_layers": 0,
        "self_attn_every_n_layers": 2,
        "resize_imgs_with_padding": [32, 32],
        "min_period": 0.004,
        "max_period": 4.0,
        "num_steps": STEPS,
        "max_state_dim": WIDTH,
        "max_action_dim": WIDTH,
        "tokenizer_max_length": 12,
        "vlm_model_name": "someone/SmolVLM2",
    }
    lerobot_folder(path, STATE, ACTION, "MEAN_STD", CAMERAS, more)
    _with_words(path)
    generator = np.random.default_rng(seed)
    tables = {}
    for name, size in (("action", ACTION), ("observation.state", STATE)):
        mean, std = generator.normal(0, 0.3, size), generator.uniform(0.5, 1.5, size)
        tables[name] = {"mean": mean, "std": std, "min": mean - 3 * std, "max": mean + 3 * std}
    write_statistics(path, tables)
    torch.manual_seed(seed)
    module = SmolVlaModule(arch)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:  # outputs as large as inputs
                weight.normal_(0, weight[0].numel() ** -0.5)
    stored = {
        f"model.{upstream_name(name)}": tensor.contiguous()
        for name, tensor in module.state_dict().items()
    }
    save_file(stored, path / "model.safetensors")
    vlm = path / "vlm"
    vlm.mkdir()
    tokenizer.save(str(vlm / "tokenizer.json"))
    size = arch.language
    text = {
        "model_type": "llama",
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "hidden_size": size.width,
        "rms_norm_eps": size.eps,
    }
    config = {
        "model_type": "smolvlm",
        "scale_factor": arch.scale_factor,
        "text_config": text,
        "vision_config": {"num_attention_heads": 2, "layer_norm_eps": 1e-6},
    }
    (vlm / "config.json").write_text(json.dumps(config))
    return path


def _architecture(vocabulary: int) -> SmolVlaArchitecture:
    siglip = SiglipVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )
    return SmolVlaArchitecture(
        siglip=siglip,
        scale_factor=2,
        language=StackSize(24, 3, 40, 4, 2, 6, 1e-5),
        expert=StackSize(16, 3, 32, 4, 2, 6, 1e-5),
        vocab_size=vocabulary,
        self_attention_every=2,
        action_width=WIDTH,
        state_width=WIDTH,
        flow=FlowSpec(STEPS, "computed"),
    )


def _with_words(path: Path) -> None:
    """Put the steps of words into the preprocessor, and leave pictures as they are."""
    for file in (path / "policy_preprocessor.json", path / "policy_postprocessor.json"):
        document = json.loads(file.read_text())
        for step in document["steps"]:
            if "norm_map" in step["config"]:
                step["config"]["norm_map"]["VISUAL"] = "IDENTITY"
        if "pre" in file.name:
            words = {"max_length": 12, "padding_side": "right", "truncation": True}
            document["steps"][2:2] = [
                {"registry_name": "smolvla_new_line_processor", "config": {}},
                {"registry_name": "tokenizer_processor", "config": words},
            ]
        file.write_text(json.dumps(document))


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

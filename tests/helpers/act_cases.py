"""Golden cases of LeRobot's ACT, wherever they lie, and a tiny checkpoint of the same layout."""

from pathlib import Path

import numpy as np
import torch
from lerobot_cases import SIDES, small_features, write_description
from openvla_cases import FOLDER
from safetensors.torch import save_file

from qvla_export.policies.act.attention import camera_positions
from qvla_export.policies.act.policy import ActPolicy, load_act_policy
from qvla_export.policies.base import PolicyBatch
from qvla_export.shared.observation import Observation

ORACLE = FOLDER / "act"
CASES = (
    sorted(ORACLE.glob("case*.npz")) if (ORACLE / "checkpoint/model.safetensors").exists() else []
)
WIDTH, HEADS, HIDDEN, HORIZON, STATE, ACTION = 32, 2, 48, 5, 6, 4
CAMERAS = ("top", "wrist")


class ActCase:
    """One golden case and the policy that must reproduce it."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as archive:
            self.golden = dict(archive)
        self.policy: ActPolicy = load_act_policy(path.parent / "checkpoint", None, None)

    def observations(self) -> list[Observation]:
        golden = self.golden
        return [
            Observation({name: golden[f"image_{name}"][i] for name in CAMERAS}, "", state)
            for i, state in enumerate(golden["state"])
        ]

    def batch(self) -> PolicyBatch:
        return self.policy.batch(self.observations())


def write_tiny_act(
    path: Path,
    seed: int = 0,
    decoder_layers: int = 1,
    state: int = STATE,
    action: int = ACTION,
) -> Path:
    """Write a seeded, untrained checkpoint of LeRobot's layout whose every layer counts."""
    fields = {
        "n_obs_steps": 1,
        "pre_norm": False,
        "feedforward_activation": "relu",
        "replace_final_stride_with_dilation": False,
        "n_heads": HEADS,
        "n_encoder_layers": 2,
        "n_decoder_layers": decoder_layers,
        "n_action_steps": HORIZON,
        "temporal_ensemble_coeff": None,
    }
    generator = np.random.default_rng(seed)

    def table(size: int) -> dict[str, np.ndarray]:
        mean, std = generator.normal(0, 0.3, size), generator.uniform(0.5, 1.5, size)
        return {"mean": mean, "std": std, "min": mean - 2 * std, "max": mean + 2 * std}

    tables = {"action": table(action), "observation.state": table(state)}
    for name in CAMERAS:
        channels = {k: v[:, None, None] for k, v in table(3).items()}
        tables[f"observation.images.{name}"] = channels
    write_description(path, small_features(state, action, cameras=CAMERAS), tables, fields)
    weights = _weights(torch.Generator().manual_seed(seed), decoder_layers, state, action)
    save_file({f"model.{k}": v for k, v in weights.items()}, path / "model.safetensors")
    return path


def _weights(
    generator: torch.Generator, decoder_layers: int, state: int, action: int
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def linear(name: str, outputs: int, inputs: int, *kernel: int, bias: bool = True) -> None:
        shape = (outputs, inputs, *kernel)
        scale = (inputs * int(np.prod(kernel))) ** -0.5
        found[f"{name}weight"] = torch.randn(shape, generator=generator) * scale * 1.4
        if bias:
            found[f"{name}bias"] = torch.randn(outputs, generator=generator) * 0.3

    def norm(name: str, channels: int, frozen: bool = False) -> None:
        found[f"{name}.weight"] = torch.rand(channels, generator=generator) + 0.5
        found[f"{name}.bias"] = torch.randn(channels, generator=generator) * 0.2
        if frozen:
            found[f"{name}.running_mean"] = torch.randn(channels, generator=generator) * 0.1
            found[f"{name}.running_var"] = torch.rand(channels, generator=generator) + 0.5

    def attention(name: str) -> None:
        linear(f"{name}.in_proj_", 3 * WIDTH, WIDTH)
        linear(f"{name}.out_proj.", WIDTH, WIDTH)

    linear("backbone.conv1.", 4, 3, 7, 7, bias=False)
    norm("backbone.bn1", 4, frozen=True)
    inputs = 4
    for stage, channels in enumerate((4, 4, 8, 8), 1):
        block = f"backbone.layer{stage}.0"
        linear(f"{block}.conv1.", channels, inputs, 3, 3, bias=False)
        linear(f"{block}.conv2.", channels, channels, 3, 3, bias=False)
        norm(f"{block}.bn1", channels, frozen=True)
        norm(f"{block}.bn2", channels, frozen=True)
        if stage > 1:
            linear(f"{block}.downsample.0.", channels, inputs, 1, 1, bias=False)
            norm(f"{block}.downsample.1", channels, frozen=True)
        inputs = channels
    for number in range(2 + decoder_layers):
        encodes = number < 2
        block = f"encoder.layers.{number}" if encodes else f"decoder.layers.{number - 2}"
        attention(f"{block}.self_attn")
        if not encodes:
            attention(f"{block}.multihead_attn")
        linear(f"{block}.linear1.", HIDDEN, WIDTH)
        linear(f"{block}.linear2.", WIDTH, HIDDEN)
        for i in range(2 if encodes else 3):
            norm(f"{block}.norm{i + 1}", WIDTH)
    norm("decoder.norm", WIDTH)
    for name, size in (("robot_state", state), ("latent", 8)):
        linear(f"encoder_{name}_input_proj.", WIDTH, size)
    linear("encoder_img_feat_input_proj.", WIDTH, inputs, 1, 1)
    found["encoder_1d_feature_pos_embed.weight"] = torch.randn(2, WIDTH, generator=generator)
    found["decoder_pos_embed.weight"] = torch.randn(HORIZON, WIDTH, generator=generator)
    linear("action_head.", action, WIDTH)
    # Of the encoder that trains the latent: in the file, and not read.
    attention("vae_encoder.layers.0.self_attn")
    found["vae_encoder_pos_enc"] = camera_positions(1, 3, WIDTH)
    return found


def act_observations(count: int, seed: int = 0, state: int = STATE) -> list[Observation]:
    generator = np.random.default_rng(seed)
    return [
        Observation(
            {n: generator.integers(0, 256, (*SIDES, 3), dtype=np.uint8) for n in CAMERAS},
            "",
            generator.normal(0, 1, state).astype(np.float32),
        )
        for _ in range(count)
    ]

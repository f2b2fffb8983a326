"""An OpenVLA-OFT checkpoint of a published size with random weights, written shard by shard.

For measuring what a size costs where no checkpoint of it can be had. Its actions mean nothing.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from qvla_export.latency_model.published_sizes import Geometry
from qvla_export.policies.oft.architecture import OftArchitecture
from qvla_export.policies.oft.config import PRESETS, OftConfig
from qvla_export.policies.oft.module import OftModule
from qvla_export.policies.prismatic.files import HEAD
from qvla_export.policies.prismatic.keys import to_upstream
from qvla_export.policies.prismatic.new_checkpoint import save_description, train_tokenizer
from qvla_export.policies.prismatic.random_weights import (
    RANDOM_PROMPTS,
    geometry_shapes,
    random_tensor,
    write_random_body,
)
from qvla_export.shared.artifacts import new_folder
from qvla_export.shared.policy_interface import save_policy_config

_PARTS = ("action_head", "proprio_projector")


def write_random_checkpoint(
    path: Path,
    geometry: Geometry,
    seed: int = 0,
    config: OftConfig = PRESETS["libero"],
    shard_bytes: int = 1 << 30,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a whole checkpoint folder in the published layout, one shard in memory at a time.

    Args:
        path: the folder to create or replace.
        geometry: sizes of towers and decoder.
        seed: equal seeds give equal weights.
        config: cameras, horizon and dimensions.
        shard_bytes: about how large a shard may be.
        on_progress: called with (bytes written, bytes in all) after each shard.
    """
    arch = _architecture(geometry, config)
    with torch.device("meta"):
        shapes = to_upstream(OftModule(arch).state_dict())
    embedding = shapes["language_model.model.embed_tokens.weight"]
    shapes[HEAD] = embedding  # published files carry it
    body = {k: v for k, v in shapes.items() if not k.startswith(_PARTS)}
    generator = torch.Generator().manual_seed(seed)
    with new_folder(path) as folder:
        write_random_body(folder, body, generator, shard_bytes, on_progress)
        for part in _PARTS:
            keys = [key for key in shapes if key.startswith(part)]
            state = {
                f"module.{key.removeprefix(part + '.')}": random_tensor(key, shapes[key], generator)
                for key in keys
            }
            if state:
                torch.save(state, folder / f"{part}--0_checkpoint.pt")
        save_description(folder, arch, train_tokenizer(RANDOM_PROMPTS, 300), _statistics(config))
        save_policy_config(config, folder)


def _architecture(geometry: Geometry, config: OftConfig) -> OftArchitecture:
    shapes = geometry_shapes(geometry, config.vision_heads)
    return OftArchitecture(
        **vars(shapes),
        horizon=config.horizon,
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        head="l1",
        head_dim=int(shapes.llama.hidden_size),
        stop_token_id=config.stop_token_id,
    )


def _statistics(config: OftConfig) -> dict[str, object]:
    def bounds(size: int) -> dict[str, list[float]]:
        low, high = [-1.0] * size, [1.0] * size
        return {"q01": low, "q99": high, "min": low, "max": high}

    action = {**bounds(config.action_dim), "mask": [True] * config.action_dim}
    return {"random": {"action": action, "proprio": bounds(config.state_dim)}}

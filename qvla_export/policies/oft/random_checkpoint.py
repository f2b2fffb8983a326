"""An OpenVLA-OFT checkpoint of a published size with random weights, written shard by shard.

For measuring what a size costs where no checkpoint of it can be had. Its actions mean nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qvla_export.latency_model.published_sizes import Geometry
from qvla_export.policies.oft.architecture import OftArchitecture
from qvla_export.policies.oft.config import PRESETS, OftConfig
from qvla_export.policies.oft.module import OftModule
from qvla_export.policies.oft.new_checkpoint import save_description, train_tokenizer
from qvla_export.policies.prismatic.description import llama_config, vision_configs
from qvla_export.policies.prismatic.keys import to_upstream
from qvla_export.shared.artifacts import new_folder

_PARTS = ("action_head", "proprio_projector")
_VOCABULARY, _PADDING = 32064, 64
_HEAD_DIM = 128  # of Llama's attention
_PROMPTS = ("In: What action should the robot take to pick up the black bowl?\nOut:",)


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
    shapes["language_model.lm_head.weight"] = embedding  # published files carry it
    body = {k: v for k, v in shapes.items() if not k.startswith(_PARTS)}
    total, written = 2 * sum(t.numel() for t in body.values()), 0
    generator = torch.Generator().manual_seed(seed)
    with new_folder(path) as folder:
        shards = list(_shards(body, shard_bytes))
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {key: _random(key, value, generator) for key, value in shard.items()}
            save_file(tensors, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            written += sum(t.nbytes for t in tensors.values())
            if on_progress is not None:
                on_progress(written, total)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for part in _PARTS:
            keys = [key for key in shapes if key.startswith(part)]
            state = {
                f"module.{key.removeprefix(part + '.')}": _random(key, shapes[key], generator)
                for key in keys
            }
            if state:
                torch.save(state, folder / f"{part}--0_checkpoint.pt")
        save_description(folder, arch, config, train_tokenizer(_PROMPTS, 300), _statistics(config))


def _architecture(geometry: Geometry, config: OftConfig) -> OftArchitecture:
    towers = (geometry.dino, geometry.siglip)
    side = geometry.inputs.image_size
    dino, siglip = vision_configs(
        dims=(towers[0].width, towers[1].width),
        # A geometry counts the blocks that are used; the last one of a tower never is.
        depths=(towers[0].depth + 1, towers[1].depth + 1),
        heads=config.vision_heads,
        mlp_dims=(towers[0].mlp, towers[1].mlp),
        patch=geometry.patch_size,
        image_sizes=(side, side),
    )
    width = geometry.llama.width
    heads = width // _HEAD_DIM
    llama = llama_config(
        {
            "hidden_size": width,
            "intermediate_size": geometry.llama.mlp,
            "num_hidden_layers": geometry.llama.depth,
            "num_attention_heads": heads,
            "num_key_value_heads": (geometry.llama.kv_width or width) // _HEAD_DIM,
            "vocab_size": _VOCABULARY,
            "pad_token_id": _VOCABULARY - _PADDING,
        }
    )
    return OftArchitecture(
        dino=dino,
        siglip=siglip,
        llama=llama,
        horizon=config.horizon,
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        head="l1",
        head_dim=width,
        stop_token_id=config.stop_token_id,
        vocab_padding=_PADDING,
    )


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if shard and 2 * sum(t.numel() for t in [*shard.values(), tensor]) > shard_bytes:
            yield shard
            shard = {}
        shard[key] = tensor
    yield shard


def _random(key: str, shape: Tensor, generator: torch.Generator) -> Tensor:
    """Weights that keep activations near 1 in bfloat16: norms of ones, rows of norm 1."""
    if shape.ndim <= 1:
        is_norm = not key.endswith("bias")
        return torch.full(shape.shape, float(is_norm), dtype=torch.bfloat16)
    inputs = shape[0].numel()
    values = torch.empty(shape.shape, dtype=torch.bfloat16)
    return values.normal_(0, inputs**-0.5, generator=generator)


def _statistics(config: OftConfig) -> dict[str, object]:
    def bounds(size: int) -> dict[str, list[float]]:
        low, high = [-1.0] * size, [1.0] * size
        return {"q01": low, "q99": high, "min": low, "max": high}

    action = {**bounds(config.action_dim), "mask": [True] * config.action_dim}
    return {"random": {"action": action, "proprio": bounds(config.state_dim)}}

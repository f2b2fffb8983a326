"""Random weights of a published size, written shard by shard.

For measuring what a size costs where no checkpoint of it can be had. Its actions mean nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qvla_export.latency_model.published_sizes import Geometry
from qvla_export.policies.prismatic.architecture import PrismaticArchitecture
from qvla_export.policies.prismatic.description import llama_config, vision_configs

_VOCABULARY, _PADDING = 32064, 64
_HEAD_DIM = 128  # of Llama's attention
# What the tokenizer of such a checkpoint is trained on.
RANDOM_PROMPTS = ("In: What action should the robot take to pick up the black bowl?\nOut:",)


def geometry_shapes(geometry: Geometry, vision_heads: tuple[int, int]) -> PrismaticArchitecture:
    """Return the shapes of a published size, with Llama-2's vocabulary."""
    towers = (geometry.dino, geometry.siglip)
    side = geometry.inputs.image_size
    dino, siglip = vision_configs(
        dims=(towers[0].width, towers[1].width),
        # A geometry counts the blocks that are used; the last one of a tower never is.
        depths=(towers[0].depth + 1, towers[1].depth + 1),
        heads=vision_heads,
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
    return PrismaticArchitecture(dino=dino, siglip=siglip, llama=llama, vocab_padding=_PADDING)


def write_random_body(
    folder: Path,
    body: Mapping[str, Tensor],
    generator: torch.Generator,
    shard_bytes: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write shards and their index into an existing folder, one shard in memory at a time.

    Args:
        folder: where.
        body: upstream key -> tensor, of whose shape the weights are.
        generator: equal seeds give equal weights.
        shard_bytes: about how large a shard may be.
        on_progress: called with (bytes written, bytes in all) after each shard.
    """
    total, written = 2 * sum(t.numel() for t in body.values()), 0
    shards = list(_shards(body, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: random_tensor(key, value, generator) for key, value in shard.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        written += sum(t.nbytes for t in tensors.values())
        if on_progress is not None:
            on_progress(written, total)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if shard and 2 * sum(t.numel() for t in [*shard.values(), tensor]) > shard_bytes:
            yield shard
            shard = {}
        shard[key] = tensor
    yield shard


def random_tensor(key: str, shape: Tensor, generator: torch.Generator) -> Tensor:
    """Return weights that keep activations near 1 in bfloat16: norms of ones, rows of norm 1."""
    if shape.ndim <= 1:
        is_norm = not key.endswith("bias")
        return torch.full(shape.shape, float(is_norm), dtype=torch.bfloat16)
    inputs = shape[0].numel()
    values = torch.empty(shape.shape, dtype=torch.bfloat16)
    return values.normal_(0, inputs**-0.5, generator=generator)

"""A UniVLA checkpoint of a published size with random weights, written shard by shard.

For measuring what a size costs where no checkpoint of it can be had. Its actions mean nothing.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from qvla_export.latency_model.published_sizes import Geometry
from qvla_export.policies.prismatic.files import HEAD
from qvla_export.policies.prismatic.keys import to_upstream
from qvla_export.policies.prismatic.new_checkpoint import save_description, train_tokenizer
from qvla_export.policies.prismatic.random_weights import (
    RANDOM_PROMPTS,
    geometry_shapes,
    random_tensor,
    write_random_body,
)
from qvla_export.policies.univla.architecture import DecoderShape, UniVlaArchitecture
from qvla_export.policies.univla.files import DECODER
from qvla_export.policies.univla.module import UniVlaModule
from qvla_export.shared.artifacts import new_folder

_VISION_HEADS, _CODEBOOK = (16, 16), 32
_DECODER = DecoderShape(width=512, heads=8, mlp=2048)


def write_random_checkpoint(
    path: Path,
    geometry: Geometry,
    seed: int = 0,
    shard_bytes: int = 1 << 30,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a whole checkpoint folder in the published layout, one shard in memory at a time.

    Args:
        path: the folder to create or replace.
        geometry: sizes of towers and decoder, the chunk and the latent tokens.
        seed: equal seeds give equal weights.
        shard_bytes: about how large a shard may be.
        on_progress: called with (bytes written, bytes in all) after each shard.
    """
    inputs = geometry.inputs
    arch = UniVlaArchitecture(
        **vars(geometry_shapes(geometry, _VISION_HEADS)),
        horizon=inputs.horizon,
        action_dim=inputs.action_dim,
        latent_tokens=inputs.latent_tokens,
        codebook=_CODEBOOK,
        decoder=_DECODER,
    )
    with torch.device("meta"):
        shapes = to_upstream(UniVlaModule(arch).state_dict())
    shapes[HEAD] = shapes["language_model.model.embed_tokens.weight"]  # of the whole vocabulary
    body = {key: tensor for key, tensor in shapes.items() if not key.startswith(f"{DECODER}.")}
    dim = inputs.action_dim
    limits = {"q01": [-1.0] * dim, "q99": [1.0] * dim}
    statistics = {"random": {"action": {**limits, "mask": [True] * (dim - 1) + [False]}}}
    with new_folder(path) as folder:
        generator = torch.Generator().manual_seed(seed)
        write_random_body(folder, body, generator, shard_bytes, on_progress)
        decoder = {
            key.removeprefix(f"{DECODER}."): random_tensor(key, tensor, generator).float()
            for key, tensor in shapes.items()
            if key.startswith(f"{DECODER}.")
        }
        torch.save(decoder, folder / f"{DECODER}.pt")
        save_description(folder, arch, train_tokenizer(RANDOM_PROMPTS, 300), statistics)

"""An OpenVLA checkpoint of a published size with random weights, written shard by shard.

For measuring what a size costs where no checkpoint of it can be had. Its actions mean nothing.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from qvla_export.latency_model.published_sizes import Geometry
from qvla_export.policies.openvla.architecture import OpenVlaArchitecture
from qvla_export.policies.openvla.module import OpenVlaModule
from qvla_export.policies.prismatic.files import HEAD
from qvla_export.policies.prismatic.keys import to_upstream
from qvla_export.policies.prismatic.new_checkpoint import save_description, train_tokenizer
from qvla_export.policies.prismatic.random_weights import (
    RANDOM_PROMPTS,
    geometry_shapes,
    write_random_body,
)
from qvla_export.shared.artifacts import new_folder

_VISION_HEADS, _ACTION_TOKENS = (16, 16), 256


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
        geometry: sizes of towers and decoder, and the action's dimensions.
        seed: equal seeds give equal weights.
        shard_bytes: about how large a shard may be.
        on_progress: called with (bytes written, bytes in all) after each shard.
    """
    dim = geometry.inputs.action_dim
    arch = OpenVlaArchitecture(
        **vars(geometry_shapes(geometry, _VISION_HEADS)),
        action_dim=dim,
        action_tokens=_ACTION_TOKENS,
    )
    with torch.device("meta"):
        body = to_upstream(OpenVlaModule(arch, torch.zeros(_ACTION_TOKENS)).state_dict())
    body[HEAD] = body["language_model.model.embed_tokens.weight"]  # of the whole vocabulary
    limits = {"q01": [-1.0] * dim, "q99": [1.0] * dim}
    statistics = {"random": {"action": {**limits, "mask": [True] * (dim - 1) + [False]}}}
    with new_folder(path) as folder:
        generator = torch.Generator().manual_seed(seed)
        write_random_body(folder, body, generator, shard_bytes, on_progress)
        save_description(folder, arch, train_tokenizer(RANDOM_PROMPTS, 300), statistics)

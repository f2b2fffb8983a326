"""Where the tensors of an OpenVLA-OFT checkpoint lie: the body, and the files of its head."""

from pathlib import Path

from torch import Tensor

from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.files import (
    part_file,
    part_names,
    require_no_film,
    require_parts_used,
)
from qvla_export.policies.prismatic.keys import from_upstream
from qvla_export.policies.prismatic.weights import (
    CheckpointWeights,
    read_state_file,
    stored_tensors,
)

# Replaced by the L1 head, but part of every published file.
_LM_HEAD = "language_model.lm_head.weight"


def open_weights(checkpoint: Path, config: OftConfig) -> CheckpointWeights:
    """Find every tensor of a checkpoint: safetensors, single or sharded, and the head files.

    Raises:
        CheckpointError: no weights, a missing, truncated or unsafe file, one that would not be
            used, or an adapter's.
    """
    require_parts_used(checkpoint, config)
    shapes: dict[str, Tensor] = {}
    places: dict[str, tuple[Path, str]] = {}
    tensors = stored_tensors(checkpoint)
    require_no_film(checkpoint, (key for _, key, _ in tensors))
    for path, key, stored in tensors:
        for name, tensor in from_upstream({key: stored}).items():
            if config.head == "l1" and name == _LM_HEAD:
                continue
            shapes[name], places[name] = tensor, (path, key)
    parts: dict[str, tuple[Path, str]] = {}
    for part in part_names(config):
        path = part_file(checkpoint, part)
        for key, tensor in read_state_file(path).items():
            shapes[f"{part}.{key}"] = tensor.to("meta")
            parts[f"{part}.{key}"] = path, part
    return CheckpointWeights(shapes, places, parts)

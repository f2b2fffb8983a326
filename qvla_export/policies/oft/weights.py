"""Where the tensors of an OpenVLA-OFT checkpoint lie: the body, and the files of its head."""

from pathlib import Path

from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.files import (
    part_file,
    part_names,
    require_no_film,
    require_parts_used,
)
from qvla_export.policies.prismatic.files import HEAD, check_body
from qvla_export.policies.prismatic.weights import CheckpointWeights, open_body


def open_weights(checkpoint: Path, config: OftConfig) -> CheckpointWeights:
    """Find every tensor of a checkpoint: safetensors, single or sharded, and the head files.

    Raises:
        CheckpointError: no weights, a missing, truncated or unsafe file, one that would not be
            used, or an adapter's.
    """
    require_parts_used(checkpoint, config)
    require_no_film(checkpoint, check_body(checkpoint))
    weights = open_body(checkpoint)
    if config.head == "l1":
        # Replaced by the L1 head, but part of every published file.
        weights = weights.without(HEAD)
    for part in part_names(config):
        weights = weights.with_part(part, part_file(checkpoint, part))
    return weights

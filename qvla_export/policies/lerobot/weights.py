"""The weights of a LeRobot checkpoint: `model.safetensors`, keys behind `model.`; read strictly.

LeRobot's own loading may return random weights where a file is cut or a key is missing, without
raising; here every key of the file is of the policy or known to be unused, and every parameter of
the policy arrives (`prismatic.network.load_network`).
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from qvla_export.policies.prismatic.files import stored_headers
from qvla_export.policies.prismatic.weights import CheckpointWeights
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.lerobot.lerobot_statistics import OLD_BUFFERS, has_processors

PREFIX = "model."


def open_weights(checkpoint: Path, unused: Iterable[str] = ()) -> CheckpointWeights:
    """Find every tensor of a checkpoint: safetensors, single or sharded; names lose `model.`.

    Args:
        checkpoint: the folder.
        unused: patterns of names, without `model.`, that the policy does not act with.

    Raises:
        CheckpointError: no weights, a missing or truncated file, an adapter's, weights that were
            quantized elsewhere, or a key outside `model.`.
    """
    patterns = tuple(unused)
    statistics = () if has_processors(checkpoint) else OLD_BUFFERS
    shapes: dict[str, Tensor] = {}
    places: dict[str, tuple[Path, str]] = {}
    strange: list[str] = []
    for stored in stored_headers(checkpoint):
        name = stored.key.removeprefix(PREFIX)
        if stored.key.startswith(statistics):
            continue
        if name == stored.key:
            strange.append(stored.key)
        elif not any(fnmatchcase(name, pattern) for pattern in patterns):
            shapes[name] = torch.empty(stored.shape, device="meta")
            places[name] = stored.path, stored.key
    if strange:
        raise CheckpointError(
            f"{checkpoint} holds {len(strange)} tensors that are none of the policy's: "
            f"{strange[:16]}; its keys begin with {PREFIX!r}"
        )
    return CheckpointWeights(shapes, places, {}, renamed=False)

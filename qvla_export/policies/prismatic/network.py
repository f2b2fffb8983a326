"""Build a network for a checkpoint's weights, with or without their numbers in memory."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from qvla_export.policies.prismatic.keys import check_keys
from qvla_export.policies.prismatic.policy import NOT_UPSTREAM
from qvla_export.policies.prismatic.weights import CheckpointWeights
from qvla_export.shared.errors import CheckpointError, QvlaError

_Module = TypeVar("_Module", bound=nn.Module)


def load_network(
    checkpoint: Path, build: Callable[[], _Module], weights: CheckpointWeights, resident: bool
) -> _Module:
    """Return the network of a checkpoint, for acting.

    Args:
        checkpoint: names it in errors.
        build: makes the network.
        weights: the checkpoint's tensors.
        resident: False leaves the weights on disk (device "meta").

    Raises:
        CheckpointError: keys do not fit; the message lists every missing, unexpected and misshapen
            key. Or the configuration describes no network.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused below
            empty = build()
    except QvlaError:
        raise
    except Exception as error:  # transformers and torch raise anything, over whatever field
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint}: no network is as its configuration says: {type(error).__name__}: "
            f"{reason:.300}; download it again, or correct what was changed"
        ) from error
    check_keys(weights.shapes, empty.state_dict(), NOT_UPSTREAM, str(checkpoint))
    return fill_network(build, weights) if resident else empty.eval().requires_grad_(False)


def fill_network(build: Callable[[], _Module], weights: CheckpointWeights) -> _Module:
    """Return a network with its weights, which have its shapes, read as float32."""
    module = build()
    for name, tensor in module.state_dict().items():
        if name in weights.shapes:
            weights.copy_to(name, tensor)
    return module.eval().requires_grad_(False)

"""Launches of this room's kernels, and what a user can do where one is refused."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.errors import TritonError

from engines.base import EngineError


@contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Name the way out where Triton cannot launch a kernel on a device.

    Raises:
        EngineError: Triton cannot compile for this GPU, or it lacks the shared memory.
    """
    try:
        yield
    except TritonError as error:
        raise EngineError(
            f"the kernel does not run on {device}: {error}; --weights unpacked runs the bundle in "
            "torch's own products"
        ) from error

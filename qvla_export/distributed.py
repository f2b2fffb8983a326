"""Several processes that measure together: who they are, and sums over all of them.

`torchrun` starts them; without it a process is alone. Sums are float64, so that shares added in
another order differ in the last bits only.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from qvla_export.errors import QvlaError

# A process that is gone is noticed by torchrun at once; this ends waiting where torchrun is not.
_PATIENCE = timedelta(hours=6)


class World(Protocol):
    """The processes of one measurement."""

    # This process's number, from 0.
    @property
    def rank(self) -> int: ...

    # Processes in all.
    @property
    def size(self) -> int: ...

    def added(self, values: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """Return the sums of every process's arrays; all give the same names and shapes."""
        ...

    def told(self, value: Any) -> Any:
        """Return process 0's value, once all have come here."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def added(self, values: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """Return the arrays."""
        return dict(values)

    def told(self, value: Any) -> Any:
        """Return the value."""
        return value


@dataclass(frozen=True)
class Together:
    """Processes of one torch.distributed group."""

    # Where the reduced tensors must lie: the GPU with nccl, the CPU with gloo.
    device: torch.device

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """Processes in all."""
        return dist.get_world_size()

    def added(self, values: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """Return the sums over all processes."""
        sums = {}
        for name, array in values.items():
            # A copy: the process goes on adding to its own share.
            tensor = torch.tensor(array, device=self.device)
            dist.all_reduce(tensor)
            sums[name] = tensor.cpu().numpy()
        return sums

    def told(self, value: Any) -> Any:
        """Return process 0's value, once all have come here."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


@contextlib.contextmanager
def joined_world() -> Iterator[World]:
    """Join the processes that torchrun started (nccl on GPUs, gloo without), or stay alone.

    Raises:
        QvlaError: there are more processes on this machine than GPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Alone()
        return
    device = local_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Together(device)
    finally:
        dist.destroy_process_group()


def local_device() -> torch.device:
    """Return this process's device: its own GPU, or the CPU of a machine that has none.

    Raises:
        QvlaError: there are more processes on this machine than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= gpus:
        raise QvlaError(
            f"process {number} of this machine has no GPU of its own, there are {gpus}; "
            f"start at most as many: torchrun --nproc-per-node {gpus}"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)

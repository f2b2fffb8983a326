"""Several processes that measure together: who they are, and sums over all of them.

`torchrun` starts them; without it a process is alone. Sums are float64, so that shares added in
another order differ in the last bits only.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qvla_export.shared.errors import QvlaError

DeviceChoice = Literal["auto", "cpu", "cuda"]
# All processes are there within this time, or none starts.
_START_PATIENCE = timedelta(minutes=5)
# A process waits this long for the others' shares. A process that is gone is noticed at once,
# by torchrun and by the connections to it; this ends the waiting for one that hangs.
DEFAULT_PATIENCE = timedelta(hours=1)
# Linux calls it lo, others lo0.
_LOOPBACK_PREFIX = "lo"


class World(Protocol):
    """The processes of one measurement."""

    # This process's number, from 0.
    @property
    def rank(self) -> int: ...

    # Processes in all.
    @property
    def size(self) -> int: ...

    # Where this process computes.
    @property
    def device(self) -> torch.device: ...

    def all_reduce_sum(
        self, values: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, NDArray[np.float64]]:
        """Return the sums of every process's arrays; all give the same names and shapes."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Return process 0's JSON value, once all have come here."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    size: int = 1

    def all_reduce_sum(
        self, values: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, NDArray[np.float64]]:
        """Return the arrays."""
        return dict(values)

    def broadcast(self, value: Any) -> Any:
        """Return the value."""
        return json.loads(json.dumps(value))


@dataclass(frozen=True)
class Together:
    """Processes of one torch.distributed group; a partner that is gone or hangs is a QvlaError."""

    # Where this process computes and the reduced tensors lie: the GPU with nccl, else the CPU.
    device: torch.device
    # Of all processes, with the time to wait for them.
    group: dist.ProcessGroup
    rank: int
    size: int

    def all_reduce_sum(
        self, values: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, NDArray[np.float64]]:
        """Return the sums over all processes."""
        sums = {}
        with _partners():
            for name, array in values.items():
                # A copy: the process goes on adding to its own share.
                tensor = torch.tensor(array, device=self.device)
                dist.all_reduce(tensor, group=self.group)
                sums[name] = tensor.cpu().numpy()
        return sums

    def broadcast(self, value: Any) -> Any:
        """Return process 0's value, once all have come here."""
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        length = torch.tensor([len(text)], device=self.device)
        with _partners():
            dist.broadcast(length, src=0, group=self.group)
            content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
            if self.rank == 0:
                content.copy_(torch.from_numpy(text.copy()))
            dist.broadcast(content, src=0, group=self.group)
        return json.loads(content.cpu().numpy().tobytes())


@dataclass(frozen=True)
class Placement:
    """Where a process computes and how it talks to the others."""

    device: str
    backend: Literal["gloo", "nccl"]


def choose_placement(
    device: DeviceChoice, gpus: int, local_rank: int = 0, local_size: int = 1
) -> Placement:
    """Return a process's device and the backend that fits: nccl between GPUs, else gloo.

    Args:
        device: "auto" takes a GPU if this machine has any.
        gpus: of this machine.
        local_rank: the process's number on this machine, from 0; it gets the GPU of that number.
        local_size: processes on this machine.

    Raises:
        QvlaError: a GPU is wanted where there is none, or there are fewer than processes.
    """
    if device == "cpu" or (device == "auto" and gpus == 0):
        return Placement("cpu", "gloo")
    if gpus == 0:
        raise QvlaError(
            "--device cuda needs an NVIDIA GPU and a torch built for it, torch sees none; "
            "use --device cpu"
        )
    if local_size > gpus:
        raise QvlaError(
            f"each process takes a GPU of its own: {local_size} processes on a machine with "
            f"{gpus}; start at most as many (torchrun --nproc-per-node {gpus}) or use --device cpu"
        )
    return Placement(f"cuda:{local_rank}", "nccl")


def started_together() -> bool:
    """Tell whether torchrun, or what stands for it, started this process among others."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def joined_world(
    device: DeviceChoice = "auto", patience: timedelta = DEFAULT_PATIENCE
) -> Iterator[World]:
    """Join the processes that torchrun started (nccl on GPUs, gloo without), or stay alone.

    Processes of one machine talk over its loopback interface only.

    Args:
        device: where to compute.
        patience: how long to wait for the others whenever all meet.

    Raises:
        QvlaError: the device cannot be had, or the others do not come.
    """
    together = started_together()
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if together else 0
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if together else 1
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    place = choose_placement(device, gpus, local_rank, local_size)
    if place.backend == "nccl":
        torch.cuda.set_device(local_rank)
        # Convolutions would round their inputs to 10 bits; matrix products do not.
        torch.backends.cudnn.allow_tf32 = False
    if not together:
        yield Alone(torch.device(place.device))
        return
    if os.environ["WORLD_SIZE"] == str(local_size):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    with _partners():
        _meet(place.backend)
        group = dist.new_group(timeout=patience)
    assert group is not None
    try:
        size = dist.get_world_size()
        yield Together(torch.device(place.device), group, dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Find the other processes through the store that torchrun keeps.

    After a restart it still holds the addresses of those that are gone, hence a part of it for
    each start.
    """
    store, rank, size = next(rendezvous("env://", timeout=_START_PATIENCE))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=PrefixStore(f"start {start}", store),
        rank=rank,
        world_size=size,
        timeout=_START_PATIENCE,
    )


@contextlib.contextmanager
def _partners() -> Iterator[None]:
    """Say what the failure of a meeting means."""
    try:
        yield
    except RuntimeError as error:
        raise QvlaError(
            "another process of this measurement ended or did not come in time; its own message "
            f"says why. The same command continues from what is on disk. ({error})"
        ) from error


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith(_LOOPBACK_PREFIX)), names[0])

"""What a measurement may use: processes, device, memory."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from qvla_export.distributed import Alone, DeviceChoice, World, joined_world
from qvla_export.errors import QvlaError


@dataclass(frozen=True)
class Resources:
    """Processes and memory of a measurement."""

    world: World = field(default_factory=Alone)
    # Observations that run together.
    batch_size: int = 8
    # For what is held at once; None for as much as it takes.
    max_bytes: int | None = None


@contextlib.contextmanager
def joined_resources(
    device: DeviceChoice, wait_minutes: float, batch_size: int, max_memory_gb: float | None
) -> Iterator[Resources]:
    """Join the processes that torchrun started; all but the first keep to warnings.

    Raises:
        QvlaError: an option is out of range, the device cannot be had, a process does not come.
    """
    if not wait_minutes > 0 or (max_memory_gb is not None and not max_memory_gb > 0):
        raise QvlaError(
            f"--wait-minutes and --max-memory-gb must be above 0, got {wait_minutes} and "
            f"{max_memory_gb}"
        )
    max_bytes = None if max_memory_gb is None else int(max_memory_gb * 1e9)
    with joined_world(device, timedelta(minutes=wait_minutes)) as world:
        if world.rank:
            logging.getLogger().setLevel(logging.WARNING)
        yield Resources(world, batch_size, max_bytes)

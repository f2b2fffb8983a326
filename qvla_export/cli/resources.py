"""What a measurement may use: processes, device, memory."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from qvla_export.cli.options import open_checkpoint
from qvla_export.distributed import Alone, DeviceChoice, World, joined_world
from qvla_export.errors import QvlaError
from qvla_export.policies.oft import OftPolicy
from qvla_export.policies.oft_config import CONFIG_NAME, PRESETS, load_config
from qvla_export.streamed import room_beside_whole

_LOG = logging.getLogger(__name__)
# Of the sensitivities.
_WIDTHS = (0, 2, 4, 8)


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
    device: DeviceChoice,
    wait_minutes: float,
    batch_size: int = 8,
    max_memory_gb: float | None = None,
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


@dataclass(frozen=True)
class Opened:
    """A policy, and what is left of the bound beside it; None without a bound."""

    policy: OftPolicy
    max_bytes: int | None


def open_within(
    resources: Resources, place: Path, unnorm_key: str | None, preset: str | None, streams: bool
) -> Opened:
    """Open a policy in memory, or with its weights left on disk where the bound wants it.

    Args:
        resources: with the bound.
        place, unnorm_key, preset: as `options.open_checkpoint`.
        streams: what is to be done with the policy can be done stage by stage.
    """
    bound, device = resources.max_bytes, resources.world.device
    if bound is None or not streams or _has_tokens(place, preset):
        loaded = open_checkpoint(place, unnorm_key, preset)
        loaded.module.to(device)
        return Opened(loaded, bound)
    stored = open_checkpoint(place, unnorm_key, preset, resident=False)
    room = room_beside_whole(stored, resources.batch_size, _WIDTHS, bound)
    if room is None:
        _LOG.info("the policy exceeds --max-memory-gb: its weights are read stage by stage")
        return Opened(stored, bound)
    loaded = stored.in_memory()
    loaded.module.to(device)
    return Opened(loaded, room)


def _has_tokens(place: Path, preset: str | None) -> bool:
    """Whether the policy has a token head, whose table of bins is not left on disk."""
    if preset in PRESETS:
        return PRESETS[preset].head == "tokens"
    return (place / CONFIG_NAME).is_file() and load_config(place).head == "tokens"

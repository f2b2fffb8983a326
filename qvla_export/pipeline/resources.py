"""What a measurement may use: processes, device, memory."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from qvla_export.measurement.distributed import Alone, DeviceChoice, World, joined_world
from qvla_export.measurement.layer_groups import NeedsOf
from qvla_export.measurement.peak_memory import available_bytes
from qvla_export.measurement.weight_placement import WeightPlacement
from qvla_export.measurement.whole_policy import room_beside_whole
from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
from qvla_export.policies.base import Policy
from qvla_export.policies.families import recognize
from qvla_export.policies.layers import Layers, traced_layers
from qvla_export.shared.errors import QvlaError

_LOG = logging.getLogger(__name__)
# Of a bound: what is not counted one by one, such as modules of the network without weights,
# buffers that torch and numpy's LAPACK take at their first use, free lists, a calibration set.
# Measured on the reference policy: 0.05 GB, with compensated codes 0.1 GB.
UNCOUNTED_BYTES = 128_000_000
# Published checkpoints are stored in bfloat16; and what of a GPU weights may take, beside a pass.
_STORED_BYTES, _GPU_SHARE = 2, 0.6


@dataclass(frozen=True)
class Demand:
    """What is done with a policy, so that its memory can be foretold."""

    # Layers and how many numbers a pass moves -> what each layer needs.
    needs_of: NeedsOf
    # Layers -> bytes of the sums that stay in memory.
    held_of: Callable[[Layers], int]


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
    max_bytes = None
    if max_memory_gb is not None:
        max_bytes = int(max_memory_gb * 1e9) - UNCOUNTED_BYTES
        if max_bytes <= 0:
            raise QvlaError(
                f"--max-memory-gb must be above {UNCOUNTED_BYTES / 1e9}, which what is "
                f"not counted one by one takes, got {max_memory_gb}; raise it"
            )
    with joined_world(device, timedelta(minutes=wait_minutes)) as world:
        if world.rank:
            logging.getLogger().setLevel(logging.WARNING)
        yield Resources(world, batch_size, max_bytes)


@dataclass(frozen=True)
class Opened:
    """A policy, and what is left of the bound beside it; None without a bound."""

    policy: Policy
    max_bytes: int | None


def open_within(resources: Resources, source: PolicySource, demand: Demand | None) -> Opened:
    """Open a policy in memory, or with its weights left on disk where the bound wants it.

    Args:
        resources: with the bound.
        source: a checkpoint.
        demand: what is to be done, if it can be done stage by stage.

    Raises:
        QvlaError: there is no bound, and this machine has less memory than that takes.
    """
    bound, placement = resources.max_bytes, WeightPlacement.on(resources.world.device)
    place = Path(source.place), source.unnorm_key, source.preset
    if not can_stay_on_disk(source):
        loaded = open_checkpoint(*place)
        loaded.module.to(placement.device)
        return Opened(loaded, bound)
    stored = open_checkpoint(*place, resident=False)
    if demand is None:
        return Opened(placement.resident(stored), bound)
    if _exceeds_gpu(stored, placement):
        _LOG.info("the policy exceeds the GPU's memory: its weights are read stage by stage")
        return Opened(stored, bound)
    held = demand.held_of(traced_layers(stored))
    room = None
    if bound is None:
        _require_memory(stored, held)
    else:
        room = room_beside_whole(stored, resources.batch_size, demand.needs_of, held, bound)
        if room is None:
            _LOG.info("the policy exceeds --max-memory-gb: its weights are read stage by stage")
            return Opened(stored, bound)
    return Opened(placement.resident(stored), room)


def _exceeds_gpu(stored: Policy, placement: WeightPlacement) -> bool:
    """Whether a policy's weights, as stored, leave too little of the GPU for a pass."""
    if placement.device.type != "cuda":
        return False
    import torch

    free, _ = torch.cuda.mem_get_info(placement.device)
    weights = _STORED_BYTES * sum(t.numel() for t in stored.module.state_dict().values())
    return bool(weights > _GPU_SHARE * free)


def _require_memory(policy: Policy, held: int) -> None:
    weights = 4 * sum(tensor.numel() for tensor in policy.module.state_dict().values())
    free = available_bytes()
    if free is not None and weights + held > free:
        raise QvlaError(
            f"the policy's weights take {weights / 1e9:.3g} GB as float32 and the sums "
            f"{held / 1e9:.3g} GB; this machine has {free / 1e9:.3g} GB left. With "
            f"--max-memory-gb {0.8 * free / 1e9:.1f} weights are read stage by stage, and what is "
            "summed is cut to fit"
        )


def can_stay_on_disk(source: PolicySource) -> bool:
    """Say whether a checkpoint's policy can be measured with its weights left on disk."""
    place = Path(source.place)
    # What is no checkpoint at all is refused when it is opened.
    return (place / "config.json").is_file() and recognize(place).can_stay_on_disk(
        place, source.preset
    )

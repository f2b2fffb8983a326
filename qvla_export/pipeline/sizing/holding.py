"""How a policy of any size is held while it is deployed: in memory as a whole, or part by part."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.measurement.distributed import DeviceChoice
    from qvla_export.pipeline.resources import Demand, Resources
    from qvla_export.policies.base import Policy
    from qvla_export.shared.observation import Observation
    from qvla_export.shared.target import Target

# Of the memory that is free: what is taken where nothing else is said.
SHARE_OF_FREE = 0.8
# Float32 copies of all weights that a deployment has in memory at its worst: the policy, the
# weights it had while it acts as a plan has it, those, and ONNX Runtime's.
WHOLE_COPIES = 4
USUAL_BATCH = 8
# Of a policy that is held part by part: the smallest parts, so that memory is that of one block.
_LAYERS_PER_PART = 1


@dataclass(frozen=True)
class HoldingOptions:
    """What the user says; None chooses by the memory that is free."""

    device: "DeviceChoice" = "auto"
    max_memory_gb: float | None = None
    batch_size: int | None = None
    layers_per_part: int | None = None


# What no option changes.
USUAL_HOLDING = HoldingOptions()


@dataclass(frozen=True)
class Holding:
    """How a policy is held, and why."""

    # "cpu" or "cuda:0": where measurements compute.
    device: str = "cpu"
    # Whether all weights are in memory; else they are read from disk part by part.
    resident: bool = True
    # Bound of what measurements take; None for as much as it takes.
    max_bytes: int | None = None
    # Observations that run together.
    batch_size: int = USUAL_BATCH
    # Decoder blocks in one part of a bundle; None for one graph of the whole policy.
    layers_per_part: int | None = None
    # In one sentence, for whoever reads the log.
    reason: str = ""

    def resources(self) -> "Resources":
        """Return what measurements may use."""
        import torch

        from qvla_export.measurement.distributed import Alone
        from qvla_export.pipeline.resources import Resources

        return Resources(Alone(torch.device(self.device)), self.batch_size, self.max_bytes)

    def describe(self) -> str:
        """Return what was chosen and why, in one line."""
        how = "in memory" if self.resident else "read from disk part by part"
        parts = self.layers_per_part
        cut = "one graph" if parts is None else f"parts of {parts} decoder block(s)"
        return (
            f"policy {how}, {self.batch_size} observations together, {cut}, on {self.device}: "
            f"{self.reason}"
        )

    def require_whole_for(self, wishes: Mapping[str, bool]) -> None:
        """Refuse what takes the whole policy in memory where it is not there.

        Args:
            wishes: options as they are written -> whether they are used.

        Raises:
            QvlaError: names what was asked for and the remedy.
        """
        asked_for = [text for text, wish in wishes.items() if wish]
        if asked_for and not self.resident:
            raise QvlaError(
                f"{' and '.join(asked_for)}: this takes the whole policy in memory, which does "
                f"not fit ({self.reason}). Leave it out, or take a machine with more memory"
            )

    def to_json(self) -> dict[str, Any]:
        """Return what a run records, so that an interrupted one goes on in the same way."""
        return {name: value for name, value in asdict(self).items() if name != "reason"}


# A policy that fits: what a call without a choice takes.
IN_MEMORY = Holding()


@dataclass(frozen=True)
class HoldingRequest:
    """What is to be held for which work."""

    source: PolicySource
    target: "Target"
    # Whether plans' codes make up for each other's errors, which takes moments.
    compensated: bool = True
    options: HoldingOptions = USUAL_HOLDING
    # What an interrupted run recorded: "policy_digest" and "holding".
    recorded: Mapping[str, Any] | None = None
    # One that the policy takes; None for a blank one.
    observation: "Observation | None" = None


@dataclass(frozen=True)
class HeldPolicy:
    """A policy that was opened as its holding says."""

    holding: Holding
    policy: "Policy"


def open_held(request: HoldingRequest) -> HeldPolicy:
    """Choose by size, free memory and options how to hold a policy, and open it so.

    Raises:
        QvlaError: an option is out of range, the device cannot be had, or memory is too little
            even part by part; says how much is needed.
    """
    from qvla_export.pipeline.resources import can_stay_on_disk

    options, source = request.options, request.source
    place = Path(source.place), source.unnorm_key, source.preset
    device = _device(options.device)
    if not can_stay_on_disk(source):
        opened = open_checkpoint(*place)
        holding = replace(_usual(options, device), reason="its family is read as a whole")
        return HeldPolicy(holding, opened)
    stored = open_checkpoint(*place, resident=False)
    holding = _earlier(request, stored.digest, device) or choose_holding(request, stored, device)
    return HeldPolicy(holding, stored.in_memory() if holding.resident else stored)


def choose_holding(request: HoldingRequest, stored: "Policy", device: str = "cpu") -> Holding:
    """Choose how to hold a policy whose weights were left on disk.

    Raises:
        QvlaError: see `open_held`.
    """
    from qvla_export.measurement.whole_policy import room_beside_whole
    from qvla_export.pipeline.sensitivities import first_order_demand
    from qvla_export.policies.layers import traced_layers

    options = request.options
    usual, bound = _usual(options, device), _bound(options, device)
    if bound is None:
        return replace(usual, reason="this system does not tell how much memory is free")
    weights = 4 * sum(tensor.numel() for tensor in stored.module.state_dict().values())
    demand = first_order_demand(request.target, request.compensated)
    held = demand.held_of(traced_layers(stored))
    room = room_beside_whole(stored, usual.batch_size, demand.needs_of, held, bound)
    limit = "--max-memory-gb" if options.max_memory_gb else "80 % of what is free"
    about = (
        f"float32 weights of {weights / 1e9:.3g} GB, up to {WHOLE_COPIES} times as exported and "
        f"judged, beside {held / 1e9:.3g} GB of sums; {bound / 1e9:.3g} GB are {limit}"
    )
    if room is not None and WHOLE_COPIES * weights <= bound:
        return replace(usual, max_bytes=room, reason=about)
    cut = replace(
        usual,
        resident=False,
        max_bytes=bound,
        layers_per_part=options.layers_per_part or _LAYERS_PER_PART,
        reason=about,
    )
    return _fitting(request, stored, demand, cut)


def _usual(options: HoldingOptions, device: str) -> Holding:
    size = options.batch_size or USUAL_BATCH
    return Holding(device, batch_size=size, layers_per_part=options.layers_per_part)


def _device(choice: "DeviceChoice") -> str:
    import torch

    from qvla_export.measurement.distributed import choose_placement

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return choose_placement(choice, gpus).device


def _bound(options: HoldingOptions, device: str) -> int | None:
    """Return the bytes that may be taken, where the options or the system say."""
    import torch

    from qvla_export.measurement.peak_memory import available_bytes
    from qvla_export.pipeline.resources import UNCOUNTED_BYTES

    if options.max_memory_gb is not None:
        bound = int(options.max_memory_gb * 1e9) - UNCOUNTED_BYTES
        if bound <= 0:
            raise QvlaError(
                f"--max-memory-gb must be above {UNCOUNTED_BYTES / 1e9}, which what is not "
                f"counted one by one takes, got {options.max_memory_gb}; raise it"
            )
        return bound
    free = available_bytes()
    if device != "cpu":
        on_device, _ = torch.cuda.mem_get_info(device)
        free = on_device if free is None else min(free, on_device)
    return None if free is None else int(SHARE_OF_FREE * free)


def _earlier(request: HoldingRequest, digest: str, device: str) -> Holding | None:
    """Return how the run held this policy when it began, unless the options say otherwise."""
    recorded, options = request.recorded or {}, request.options
    if recorded.get("policy_digest") != digest or not isinstance(recorded.get("holding"), dict):
        return None
    try:
        earlier = Holding(**recorded["holding"], reason="as this run began")
    except TypeError:
        return None  # of another version
    free = _bound(HoldingOptions(), device)
    said = (options.batch_size, options.layers_per_part)
    differs = any(
        one not in (None, other)
        for one, other in zip(said, (earlier.batch_size, earlier.layers_per_part), strict=True)
    )
    # Of a bound, what counts is whether it still holds here.
    too_much = free is not None and not earlier.resident and (earlier.max_bytes or 0) > free / 0.8
    if differs or too_much or earlier.device != device or options.max_memory_gb is not None:
        return None
    return earlier


def _fitting(request: HoldingRequest, stored: "Policy", demand: "Demand", cut: Holding) -> Holding:
    """Return a holding with as many observations together as fit, where none are asked for."""
    import torch

    from qvla_export.measurement.stream_limits import StreamLimits, open_stream
    from qvla_export.measurement.weight_placement import WeightPlacement
    from qvla_export.pipeline.sensitivities import first_order_demand
    from qvla_export.policies.layers import traced_layers

    layers = traced_layers(stored)
    # Moments take the blocks that fit; sensitivities only have sums of their own beside a part.
    held = first_order_demand(request.target, compensated=False).held_of(layers)
    observation = request.observation or blank_observation(stored)
    size, placement = cut.batch_size, WeightPlacement.on(torch.device(cut.device))
    while True:
        limits = StreamLimits(size, 1, demand.needs_of, held, cut.max_bytes)
        try:
            open_stream(stored, layers, [observation], limits, placement)
        except QvlaError:
            if size == 1 or request.options.batch_size is not None:
                raise
            size //= 2
        else:
            return replace(cut, batch_size=size)


def blank_observation(policy: "Policy") -> "Observation":
    """Return an observation that a policy takes: black images, a short instruction, no motion."""
    import numpy as np

    from qvla_export.shared.observation import Observation

    spec = policy.processor.spec
    images = {name: np.zeros((*spec.frame_size, 3), np.uint8) for name in spec.cameras}
    return Observation(images, "pick up the object", np.zeros(spec.state_dim, np.float32))

"""The noun `BoardState`: what can change a latency besides the policy. Nothing identifies the
machine: no host name, serial or address."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from qvla_export.shared.errors import ArtifactError


@dataclass(frozen=True)
class ClockState:
    """One clock domain, frequencies in MHz; None where they cannot be read."""

    # "cpu0" and so on, "gpu", "emc" (the memory).
    name: str
    mhz: float | None = None
    # What the governor may choose between.
    min_mhz: float | None = None
    max_mhz: float | None = None
    # Whether it cannot change: no choice is left, or the frequency is held.
    locked: bool | None = None


@dataclass(frozen=True)
class BoardState:
    """A machine at one moment; empty or None where it is not known."""

    # Module or machine, from the device tree (Jetson) or DMI.
    model: str
    # Jetson Linux release, e.g. "36.4.3"; empty elsewhere.
    l4t: str
    kernel: str
    cpu_model: str
    # Online cores.
    cores: int
    # Frequency governors in use, and each core's current frequency in MHz.
    governors: tuple[str, ...]
    cpu_mhz: tuple[float, ...]
    # Runnable tasks, mean of the last minute.
    load_1m: float | None
    memory_total_bytes: int | None
    # What the whole system could still give, caches included: of it, what a policy takes is the
    # difference of two states.
    memory_available_bytes: int | None
    # Part number of the Jetson module, "p3701-0005".
    module: str = ""
    # "6.2"; and TensorRT's version, "10.3.0.30".
    jetpack: str = ""
    tensorrt: str = ""
    # Name of nvpmodel's mode, "MAXN"; its number where the names cannot be read.
    power_mode: str | None = None
    # Whether every clock that can be read is locked (`jetson_clocks`).
    clocks_locked: bool | None = None
    clocks: tuple[ClockState, ...] = ()
    # Thermal zone -> degrees Celsius; zones that are switched off are left out.
    temperatures_c: Mapping[str, float] = field(default_factory=dict)
    # Power rail -> milliwatts. Their sum is not the power the board takes in.
    rails_mw: Mapping[str, float] = field(default_factory=dict)
    # What slows the board down now, by the kernel's names, fans left out.
    throttling: tuple[str, ...] = ()
    # Counter -> how often the hardware has slowed down since boot; compare two states.
    throttle_counts: Mapping[str, int] = field(default_factory=dict)
    swap_total_bytes: int | None = None
    swap_used_bytes: int | None = None
    # The part of it that is compressed memory.
    zram_bytes: int | None = None
    # tegrastats' "lfb 3x4MB": physically contiguous memory; how many blocks of the largest size.
    largest_free_block_bytes: int | None = None
    largest_free_blocks: int | None = None

    @property
    def is_jetson(self) -> bool:
        """Whether the machine is a Jetson."""
        return bool(self.l4t or self.module) or "jetson" in self.model.lower()

    def clock(self, name: str) -> ClockState | None:
        """Return a clock by name; None where it cannot be read."""
        return next((clock for clock in self.clocks if clock.name == name), None)

    def filled_from(self, other: "BoardState") -> "BoardState":
        """Return this state with what it does not know taken from another of the same board."""
        found: dict[str, Any] = {}
        for name in (part.name for part in fields(self)):
            ours, theirs = getattr(self, name), getattr(other, name)
            if name in _MAPPINGS:
                found[name] = {**theirs, **ours}
            elif name == "clocks":
                found[name] = _merge(ours, theirs)
            else:
                # 0 swap and unlocked clocks are known.
                unknown = ours is None or ours in ("", ()) or (name == "cores" and not ours)
                found[name] = theirs if unknown else ours
        return replace(self, **found)

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        shown["clocks"] = [asdict(clock) for clock in self.clocks]
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in shown.items()}

    @classmethod
    def from_json(cls, value: Any) -> "BoardState":
        """Read what `to_json` wrote; what older versions did not write is unknown.

        Raises:
            ArtifactError: a field is missing or of the wrong kind.
        """
        needed = [part.name for part in fields(cls)][:_FIRST_FIELDS]
        if not isinstance(value, dict) or any(name not in value for name in needed):
            raise ArtifactError(f"a board state needs {needed}, got {value!r:.200}")
        known = {part.name: value[part.name] for part in fields(cls) if part.name in value}
        try:
            for name in {*_TUPLES} & set(known):
                known[name] = tuple(known[name])
            known["clocks"] = tuple(ClockState(**clock) for clock in known.get("clocks", ()))
            for name in {*_MAPPINGS} & set(known):
                known[name] = dict(known[name])
                if not all(math.isfinite(number) for number in known[name].values()):
                    raise ValueError(f"{name} must be finite, got {known[name]}")
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"a board state is damaged: {error}") from None
        return cls(**known)


_MAPPINGS = ("temperatures_c", "rails_mw", "throttle_counts")
_TUPLES = ("governors", "cpu_mhz", "throttling")
# Fields that the first version wrote.
_FIRST_FIELDS = 10
UNKNOWN = BoardState("", "", "", "", 0, (), (), None, None, None)


def all_locked(clocks: Iterable[ClockState]) -> bool | None:
    """Say whether all clocks are locked of which that is known; None if it is of none."""
    known = [clock.locked for clock in clocks if clock.locked is not None]
    return all(known) if known else None


def _merge(ours: tuple[ClockState, ...], theirs: tuple[ClockState, ...]) -> tuple[ClockState, ...]:
    found = {clock.name: clock for clock in ours}
    for clock in theirs:
        known = {k: v for k, v in asdict(found.get(clock.name, clock)).items() if v is not None}
        found[clock.name] = replace(clock, **known)
    return tuple(found.values())

"""What the service of `jetson-stats` knows, which runs as root: clocks of the memory, rails."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from jetson.board.sensors import is_measured, is_rail, zone_name
from jetson.board.state import UNKNOWN, BoardState, ClockState

_KHZ = 1e3


def open_jtop() -> AbstractContextManager[Any] | None:
    """Return a connection to the service, to be entered; None where jetson-stats is missing."""
    try:
        from jtop import jtop
    except ImportError:
        return None
    connection: AbstractContextManager[Any] = jtop()
    return connection


def read_jtop(
    connect: Callable[[], AbstractContextManager[Any] | None] = open_jtop,
) -> BoardState:
    """Return what jetson-stats says of the board; nothing where it does not answer."""
    try:
        connection = connect()
        if connection is None:
            return UNKNOWN
        with connection as service:
            return state_of(service)
    # A library of whatever version, talking to a service that may not run: its answer is a
    # help, and no reason to measure nothing.
    except Exception:
        return UNKNOWN


def state_of(service: Any) -> BoardState:
    """Return the state that an open `jtop.jtop` shows; see its reference for the keys."""
    hardware = _part(service.board, "hardware")
    frequencies = [_part(gpu, "freq") for gpu in dict(service.gpu).values()]
    clocks = [_clock("gpu", found) for found in frequencies if found][:1]
    emc = _part(service.memory, "EMC")
    clocks += [_clock("emc", emc)] if emc else []
    zones = {zone_name(str(k)): v for k, v in dict(service.temperature).items()}
    rails = _part(service.power, "rail")
    mode = getattr(service.nvpmodel, "name", None)
    locked = service.jetson_clocks
    return replace(
        UNKNOWN,
        model=str(hardware.get("Model", "")),
        l4t=str(hardware.get("L4T", "")),
        jetpack=str(hardware.get("Jetpack", "")),
        tensorrt=str(_part(service.board, "libraries").get("TensorRT", "")),
        power_mode=None if mode is None else str(mode),
        clocks_locked=None if locked is None else bool(locked),
        clocks=tuple(clocks),
        temperatures_c={
            name: float(zone["temp"])
            for name, zone in zones.items()
            if zone.get("online", True) and is_measured(name, float(zone["temp"]))
        },
        rails_mw={
            str(name): float(rail["power"]) for name, rail in rails.items() if is_rail(str(name))
        },
    )


def _part(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}


def _clock(name: str, found: Mapping[str, Any]) -> ClockState:
    mhz, slowest, fastest = (
        None if found.get(key) is None else float(found[key]) / _KHZ
        for key in ("cur", "min", "max")
    )
    # As jetson-stats judges: the memory is locked where it runs as fast as it may.
    held = mhz if name == "emc" else slowest
    return ClockState(
        name, mhz, slowest, fastest, None if None in (held, fastest) else held == fastest
    )

"""Clocks, power mode and throttling: what makes the same policy later on the same board."""

from collections.abc import Mapping

from jetson.board.state import BoardState, ClockState
from jetson.doctor.finding import BoardFinding, Check
from jetson.doctor.machine import Machine

NO_JETSON = "this is no Jetson"
_LOCKED = Check(
    "clocks locked",
    "clocks that fall between actions make the next action late",
    "jetson_clocks",
)
_GOVERNOR = Check(
    "CPU governor", "cores that clock down while idle make the next action late", "performance"
)
_POWER = Check(
    "power mode", "a capped mode switches processors off and slows the others and the memory"
)
_THROTTLING = Check("throttling now", "a hot machine clocks down whatever its settings", "nothing")
_HOT = Check("throttled since boot", "it was too hot before and will be again under load", "never")
_OVER_CURRENT = Check(
    "over-current events", "the board clocks down when its supply cannot follow", "none"
)
# Instead of jetson_clocks, for which there is no package elsewhere.
_SET_GOVERNOR = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
_SHOW_COOLING = "watch -n 2 grep -H . /sys/class/thermal/cooling_device*/cur_state"


def check_clocks_locked(board: BoardState) -> BoardFinding:
    """Look whether `jetson_clocks` holds the clocks of a Jetson."""
    if not board.is_jetson:
        return _LOCKED.inapplicable(NO_JETSON)
    loose = [clock for clock in board.clocks if clock.locked is False]
    if loose:
        return _LOCKED.warning(", ".join(map(_range, _one_a_kind(loose))), "sudo jetson_clocks")
    if board.clocks_locked is None:
        return _LOCKED.unknown("no clock can be read", "sudo jetson_clocks --show")
    held = ", ".join(clock.name for clock in _one_a_kind(board.clocks) if clock.locked)
    return _LOCKED.ok(f"{held} held")


def check_governor(board: BoardState) -> BoardFinding:
    """Look at the frequency governors of a machine that has no jetson_clocks."""
    if board.is_jetson:
        return _GOVERNOR.inapplicable("jetson_clocks holds a Jetson's clocks")
    if not board.governors:
        return _GOVERNOR.inapplicable("the CPU's frequency cannot be set here")
    found = ", ".join(board.governors)
    if board.governors == ("performance",) or board.clocks_locked:
        return _GOVERNOR.ok(f"{found}, clocks held" if board.clocks_locked else found)
    return _GOVERNOR.warning(found, _SET_GOVERNOR)


def check_power_mode(
    machine: Machine, built_in: str | None = None, rebuild: str | None = None
) -> BoardFinding:
    """Look whether a Jetson is in its fastest mode, in which its engines were timed.

    Args:
        machine: this machine.
        built_in: mode in which the kernels of the engines were chosen; None if not known.
        rebuild: command that builds them again.
    """
    board, fastest = machine.board, machine.fastest_mode
    if not board.is_jetson:
        return _POWER.inapplicable(NO_JETSON)
    if board.power_mode is None:
        return _POWER.unknown("nvpmodel's status cannot be read", "sudo nvpmodel -q")
    mode = board.power_mode
    if fastest is not None and not _same(mode, fastest[1]) and mode != str(fastest[0]):
        return _POWER.warning(
            mode,
            f"sudo nvpmodel -m {fastest[0]} (it may ask for a reboot), then sudo jetson_clocks",
            wanted=fastest[1],
        )
    if built_in is not None and not _same(built_in, mode):
        return _POWER.warning(
            f"{mode}, engines were built in {built_in}",
            rebuild or _set_mode(machine.power_modes, built_in),
            wanted="the engines' mode",
        )
    if fastest is None:
        return _POWER.unknown(f"{mode}; no mode is named MAXN", "sudo nvpmodel -p --verbose")
    return _POWER.ok(mode)


def check_throttling(board: BoardState) -> BoardFinding:
    """Look at what the kernel slows down at this moment."""
    if not board.throttling and not board.temperatures_c:
        return _THROTTLING.inapplicable("no temperatures can be read here")
    hottest = max(board.temperatures_c, key=lambda name: board.temperatures_c[name], default=None)
    heat = "" if hottest is None else f"{hottest} {board.temperatures_c[hottest]:.0f} C"
    if not board.throttling:
        return _THROTTLING.ok(f"nothing, hottest {heat}")
    fan = "sudo jetson_clocks --fan, and more cooling; then" if board.is_jetson else "cool it;"
    return _THROTTLING.warning(
        ", ".join(filter(None, (*board.throttling, heat))), f"{fan} {_SHOW_COOLING}"
    )


def check_throttled(board: BoardState) -> BoardFinding:
    """Look at the hardware's counters of thermal events."""
    counts = {name: n for name, n in board.throttle_counts.items() if not _is_over_current(name)}
    if not counts:
        return _HOT.inapplicable("no counters of thermal events here")
    shown = _count_events(counts)
    return (
        _HOT.warning(shown, "cool it; the counts start again with: sudo reboot")
        if any(counts.values())
        else _HOT.ok("never")
    )


def check_over_current(machine: Machine) -> BoardFinding:
    """Look at a Jetson's counters of over-current events."""
    counts = {n: c for n, c in machine.board.throttle_counts.items() if _is_over_current(n)}
    if not counts:
        return _OVER_CURRENT.inapplicable("no over-current counters here")
    if not any(counts.values()):
        return _OVER_CURRENT.ok("none since boot")
    return _OVER_CURRENT.warning(
        f"{_count_events(counts)} since boot",
        "use a stronger power supply, or a slower mode of: sudo nvpmodel -p --verbose; the counts "
        "start again with: sudo reboot",
    )


def _one_a_kind(clocks: "tuple[ClockState, ...] | list[ClockState]") -> list[ClockState]:
    """Return the clocks with one core for all."""
    cores = [clock for clock in clocks if clock.name.startswith("cpu")]
    return [*cores[:1], *(clock for clock in clocks if clock not in cores)]


def _range(clock: ClockState) -> str:
    if clock.min_mhz is None or clock.max_mhz is None or clock.min_mhz == clock.max_mhz:
        return f"{clock.name} not held"
    return f"{clock.name} {clock.min_mhz:.0f} to {clock.max_mhz:.0f} MHz"


def _same(mode: str, other: str) -> bool:
    """Say whether two names mean one mode: "MODE_30W" is "30W"."""
    return mode.upper().removeprefix("MODE_") == other.upper().removeprefix("MODE_")


def _set_mode(modes: Mapping[int, str], name: str) -> str:
    number = next((number for number, mode in modes.items() if _same(mode, name)), None)
    return "sudo nvpmodel -p --verbose" if number is None else f"sudo nvpmodel -m {number}"


def _is_over_current(counter: str) -> bool:
    return counter.startswith("oc")


def _count_events(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items() if number)

"""Clocks of the CPU, the GPU and the memory, and whether they are locked.

CPU and GPU are locked when the governor's limits are equal, which is what `jetson_clocks` does.
The memory's rate is held through bpmp's debugfs, which root alone can read; Thor has devfreq for
it. Paths: jetson-stats' `gpu.py` and `memory.py`; Jetson Linux r35 to r39.
"""

from pathlib import Path

from jetson.board.files import number_of, numbers_of, paths_in, text_of
from jetson.board.state import ClockState

# Names of the GPU in the device tree: Xavier, Orin, Thor.
_GPU_NODES = ("gpu", "gv11b", "ga10b", "gb10b")
_THOR_GPC = "gpu-gpc-0"
_MEMORY = "bwmgr"
_LIMITS = ("cur_freq", "min_freq", "max_freq")


def read_clocks(root: Path) -> tuple[ClockState, ...]:
    """Return the clocks that can be read, the CPU's cores first."""
    parts = (*_cpu_clocks(root), _gpu_clock(root), _memory_clock(root))
    return tuple(clock for clock in parts if clock is not None)


def _cpu_clocks(root: Path) -> list[ClockState | None]:
    folders = paths_in(root / "sys/devices/system/cpu", "cpu[0-9]*/cpufreq")
    names = ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq")
    return [_clock(folder.parent.name, folder, names, 1e3) for folder in folders]


def _gpu_clock(root: Path) -> ClockState | None:
    for folder in paths_in(root / "sys/class/devfreq", "*"):
        node = text_of(folder / "device/of_node/name").lower()
        if folder.name == _THOR_GPC or node in _GPU_NODES or _is_gpu(folder.name):
            return _clock("gpu", folder, _LIMITS, 1e6)
    return None


def _is_gpu(device: str) -> bool:
    """Say whether a device such as "17000000.gpu" or "17000000.ga10b" is the GPU."""
    return device.rpartition(".")[2] in _GPU_NODES


def _memory_clock(root: Path) -> ClockState | None:
    folder = root / "sys/kernel/debug/bpmp/debug/clk/emc"
    mhz = number_of(folder / "rate")
    if mhz is None:
        return _clock("emc", root / "sys/class/devfreq" / _MEMORY, _LIMITS, 1e6)
    slowest, fastest, held = numbers_of(folder, "min_rate", "max_rate", "mrq_rate_locked")
    cap = number_of(root / "sys/kernel/nvpmodel_emc_cap/emc_iso_cap")
    if cap and fastest:
        fastest = min(cap, fastest)
    locked = None if held is None else bool(held)
    return ClockState("emc", _mhz(mhz, 1e6), _mhz(slowest, 1e6), _mhz(fastest, 1e6), locked)


def _clock(name: str, folder: Path, names: tuple[str, str, str], unit: float) -> ClockState | None:
    mhz, slowest, fastest = (_mhz(value, unit) for value in numbers_of(folder, *names))
    if mhz is None and slowest is None and fastest is None:
        return None
    locked = None if slowest is None or fastest is None else slowest == fastest
    return ClockState(name, mhz, slowest, fastest, locked)


def _mhz(value: float | None, unit: float) -> float | None:
    return None if value is None else round(value / unit, 1)

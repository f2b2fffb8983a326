"""Read a board's state from files alone: milliseconds, without rights, and never an error."""

import re
from pathlib import Path

from engines.trt.gpu import read_power_mode
from jetson.board.clocks import read_clocks
from jetson.board.files import meminfo_bytes, number_of, paths_in, text_of
from jetson.board.sensors import (
    read_largest_free_block,
    read_rails_mw,
    read_temperatures_c,
    read_throttle_counts,
    read_throttling,
    read_zram_bytes,
)
from jetson.board.software import read_jetpack, read_l4t, read_module, read_tensorrt
from jetson.board.state import BoardState, all_locked


def read_board_state(root: Path = Path("/")) -> BoardState:
    """Return the machine's state now; a file that cannot be read leaves its field empty.

    Args:
        root: below which /proc, /sys, /etc and /var lie; tests build their own.
    """
    cpuinfo = text_of(root / "proc/cpuinfo")
    meminfo = text_of(root / "proc/meminfo")
    cpus = root / "sys/devices/system/cpu"
    governors = [text_of(path) for path in paths_in(cpus, "cpu[0-9]*/cpufreq/scaling_governor")]
    clocks, l4t = read_clocks(root), read_l4t(root)
    load = text_of(root / "proc/loadavg").split()
    swap_total, swap_free = meminfo_bytes(meminfo, "SwapTotal"), meminfo_bytes(meminfo, "SwapFree")
    block_bytes, blocks = read_largest_free_block(root)
    return BoardState(
        model=text_of(root / "proc/device-tree/model")
        or text_of(root / "sys/class/dmi/id/product_name"),
        l4t=l4t,
        kernel=text_of(root / "proc/sys/kernel/osrelease"),
        cpu_model=_field(cpuinfo, "model name"),
        cores=len(re.findall(r"^processor\s*:", cpuinfo, re.M)),
        governors=tuple(sorted({governor for governor in governors if governor})),
        cpu_mhz=tuple(
            clock.mhz for clock in clocks if clock.name.startswith("cpu") and clock.mhz is not None
        )
        or _listed_mhz(cpuinfo),
        load_1m=number_of(load[0]) if load else None,
        memory_total_bytes=meminfo_bytes(meminfo, "MemTotal"),
        memory_available_bytes=meminfo_bytes(meminfo, "MemAvailable"),
        module=read_module(root),
        jetpack=read_jetpack(root, l4t),
        tensorrt=read_tensorrt(root),
        power_mode=read_power_mode(root),
        clocks_locked=all_locked(clocks),
        clocks=clocks,
        temperatures_c=read_temperatures_c(root),
        rails_mw=read_rails_mw(root),
        throttling=read_throttling(root),
        throttle_counts=read_throttle_counts(root),
        swap_total_bytes=swap_total,
        swap_used_bytes=None if swap_total is None else swap_total - (swap_free or 0),
        zram_bytes=read_zram_bytes(root) if swap_total is not None else None,
        largest_free_block_bytes=block_bytes,
        largest_free_blocks=blocks,
    )


def _listed_mhz(cpuinfo: str) -> tuple[float, ...]:
    listed = [number_of(text) for text in re.findall(r"^cpu MHz\s*:\s*(\S+)", cpuinfo, re.M)]
    return tuple(round(value, 1) for value in listed if value is not None)


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.M)
    return match[1].strip() if match else ""

"""Lines of NVIDIA's `tegrastats`, as JetPack 5, 6, 7 and Thor write them.

    RAM 20642/62817MB (lfb 1x2MB)   CPU [23%@2201,off]   CPU [0%,off]@2601   EMC_FREQ 3%@3199
    GR3D_FREQ 12%   12%@1300   12%@[1300,1300]   @[1574,1574,1574]
    gpu@47.6C   gpu@47.6C/48.1C   CV0@-256C (off)   VDD_IN 2532/2698   VDD_IN 1mW/1mW/2mW

Power rails are shown to root alone on an AGX Orin; what a line lacks is unknown, not zero. A rail
that feeds current back is negative.
"""

import re
from dataclasses import dataclass, replace

from jetson.board.files import number_of
from jetson.board.sensors import is_measured, is_rail, zone_name
from jetson.board.state import UNKNOWN, BoardState, ClockState

_UNITS = {"kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
_NUMBER = r"\d+(?:\.\d+)?"
_MEMORY = re.compile(r"\b(RAM|SWAP) (\d+)/(\d+)(kB|MB|GB)")
_LFB = re.compile(r"\(lfb (\d+)x(\d+)(kB|MB|GB)\)")
_CPU = re.compile(r"\bCPU \[([^\]]*)\](?:@(\d+))?")
_ENGINE = re.compile(rf"\b(EMC_FREQ|GR3D_FREQ) ({_NUMBER}%)?(?:@(\d+|\[[^\]]*\]))?(?=\s|$)")
_TEMPERATURE = re.compile(rf"(?<!\S)([A-Za-z]\w*)@(-?{_NUMBER})C(?:/-?{_NUMBER}C)?(?=\s|$)")
_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (-?\d+)(?:mW)?/-?\d+(?:mW)?(?:/-?\d+mW)?(?=\s|$)")


@dataclass(frozen=True)
class Core:
    """One CPU core."""

    # Percent of the time; None where the line does not say.
    load_percent: float | None
    mhz: float | None


@dataclass(frozen=True)
class TegraStats:
    """One line; None or empty where it does not say."""

    ram_used_bytes: int | None
    ram_total_bytes: int | None
    # How many free blocks of the largest size there are, and the size.
    largest_free_blocks: int | None
    largest_free_block_bytes: int | None
    swap_used_bytes: int | None
    swap_total_bytes: int | None
    # In order; None for a core that is off.
    cores: tuple[Core | None, ...]
    # The memory's clock and the percentage of its bandwidth in use.
    emc_percent: float | None
    emc_mhz: float | None
    gpu_percent: float | None
    # Of each graphics cluster.
    gpu_mhz: tuple[float, ...]
    temperatures_c: dict[str, float]
    # Present milliwatts, not the mean.
    rails_mw: dict[str, float]

    def to_state(self) -> BoardState:
        """Return what the line says of a board."""
        clocks = [
            ClockState(f"cpu{index}", mhz=core.mhz)
            for index, core in enumerate(self.cores)
            if core is not None and core.mhz is not None
        ]
        clocks += [ClockState("gpu", mhz=max(self.gpu_mhz))] if self.gpu_mhz else []
        clocks += [ClockState("emc", mhz=self.emc_mhz)] if self.emc_mhz is not None else []
        return replace(
            UNKNOWN,
            cores=sum(core is not None for core in self.cores),
            cpu_mhz=tuple(
                clock.mhz
                for clock in clocks
                if clock.mhz is not None and clock.name.startswith("cpu")
            ),
            memory_total_bytes=self.ram_total_bytes,
            clocks=tuple(clocks),
            temperatures_c=self.temperatures_c,
            rails_mw=self.rails_mw,
            swap_total_bytes=self.swap_total_bytes,
            swap_used_bytes=self.swap_used_bytes,
            largest_free_block_bytes=self.largest_free_block_bytes,
            largest_free_blocks=self.largest_free_blocks,
        )


def parse_tegrastats(line: str) -> TegraStats:
    """Return what one line of tegrastats says; parts it does not know are passed over."""
    line = " ".join(line.split())
    memory = {
        name: (int(used) * _UNITS[unit], int(total) * _UNITS[unit])
        for name, used, total, unit in _MEMORY.findall(line)
    }
    ram_used, ram_total = memory.get("RAM", (None, None))
    swap_used, swap_total = memory.get("SWAP", (None, None))
    block = _LFB.search(line)
    engines = {name: (_percent(load), _clocks(mhz)) for name, load, mhz in _ENGINE.findall(line)}
    emc_percent, emc_mhz = engines.get("EMC_FREQ", (None, ()))
    gpu_percent, gpu_mhz = engines.get("GR3D_FREQ", (None, ()))
    zones = [(zone_name(name), float(value)) for name, value in _TEMPERATURE.findall(line)]
    return TegraStats(
        ram_used_bytes=ram_used,
        ram_total_bytes=ram_total,
        largest_free_blocks=int(block[1]) if block else None,
        largest_free_block_bytes=int(block[2]) * _UNITS[block[3]] if block else None,
        swap_used_bytes=swap_used,
        swap_total_bytes=swap_total,
        cores=_cores(line),
        emc_percent=emc_percent,
        emc_mhz=emc_mhz[0] if emc_mhz else None,
        gpu_percent=gpu_percent,
        gpu_mhz=gpu_mhz,
        temperatures_c={name: value for name, value in zones if is_measured(name, value)},
        rails_mw={
            name: float(mw)
            for name, mw in _RAIL.findall(line)
            if name not in memory and is_rail(name)
        },
    )


def _cores(line: str) -> tuple[Core | None, ...]:
    """Return the cores; Thor writes the frequency they share behind the list."""
    listed = _CPU.search(line)
    if listed is None:
        return ()
    shared = number_of(listed[2] or "")
    cores: list[Core | None] = []
    for text in listed[1].split(","):
        load, _, mhz = text.strip().partition("@")
        own = number_of(mhz)
        percent = _percent(load)
        known = percent is not None or own is not None
        cores.append(Core(percent, shared if own is None else own) if known else None)
    return tuple(cores)


def _percent(text: str) -> float | None:
    value = number_of(text.removesuffix("%")) if text.endswith("%") else None
    return value if value is not None and 0 <= value <= 100 else None


def _clocks(text: str) -> tuple[float, ...]:
    found = (number_of(part.strip()) for part in text.strip("[]").split(","))
    return tuple(value for value in found if value is not None and value >= 0)

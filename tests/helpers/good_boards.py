"""Jetsons of four generations with every setting right, what reads them, and findings to mend."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fake_board import orin_files, write

from engines.trt.gpu import Gpu
from jetson.board.state import UNKNOWN
from jetson.doctor.finding import BoardFinding
from jetson.doctor.machine import Machine, read_machine

ORIN_GPU = Gpu("Orin", "sm_87")
THOR_GPU = Gpu("NVIDIA Thor", "sm_110")
MEMINFO = (
    "MemTotal:       64323416 kB\nMemAvailable:   60000000 kB\nSwapTotal:              0 kB\n"
    "SwapFree:               0 kB\nCmaTotal:         262144 kB\nCmaFree:          200000 kB\n"
)
# 4 MB in the last column: 2.1 GB in 512 of them.
BUDDYINFO = "Node 0, zone Normal 9 8 7 6 5 4 3 2 1 0 512\n"
_RELEASE = "etc/nv_tegra_release"
_GPU = "sys/class/devfreq/17000000.gpu"


def _orin(release: str, **changes: str) -> dict[str, str]:
    files = orin_files()
    files |= {
        _RELEASE: f"# {release}, GCID: 1, BOARD: generic, EABI: aarch64",
        "proc/meminfo": MEMINFO,
        "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
        "proc/buddyinfo": BUDDYINFO,
        "sys/class/hwmon/hwmon2/oc3_event_cnt": "0\n",
        "var/lib/dpkg/status": "",
    }
    return files | changes


def jetpack5_files() -> dict[str, str]:
    """AGX Orin, JetPack 5.1.2: the GPU under its code name, no over-current counters."""
    files = _orin("R35 (release), REVISION: 4.1")
    for name in ("cur_freq", "min_freq", "max_freq"):
        files[f"sys/class/devfreq/17000000.ga10b/{name}"] = files.pop(f"{_GPU}/{name}")
    return {name: text for name, text in files.items() if "/oc" not in name}


def jetpack6_files() -> dict[str, str]:
    """AGX Orin, JetPack 6.2."""
    return _orin("R36 (release), REVISION: 4.3")


def jetpack7_files() -> dict[str, str]:
    """AGX Orin, JetPack 7.2."""
    return _orin("R39 (release), REVISION: 2.0")


def thor_files() -> dict[str, str]:
    """Thor, JetPack 7.0: other names of GPU and memory, and the memory's clock through devfreq."""
    files = _orin("R38 (release), REVISION: 2.2")
    files = {n: t for n, t in files.items() if "/bpmp/" not in n and not n.startswith(_GPU)}
    for device, hertz in (("gpu-gpc-0", "1574000000"), ("bwmgr", "4266000000")):
        for name in ("cur_freq", "min_freq", "max_freq"):
            files[f"sys/class/devfreq/{device}/{name}"] = f"{hertz}\n"
    files["proc/device-tree/model"] = "NVIDIA Jetson AGX Thor Developer Kit\0"
    files["proc/device-tree/compatible"] = "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0"
    files["etc/nvpmodel.conf"] = (
        "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n< PM_CONFIG DEFAULT=1 >\n"
    )
    return files


BOARDS: Mapping[str, Callable[[], dict[str, str]]] = {
    "jetpack5": jetpack5_files,
    "jetpack6": jetpack6_files,
    "jetpack7": jetpack7_files,
    "thor": thor_files,
}


def answer(command: Sequence[str]) -> str:
    """Return what the board's own commands print: nvpmodel and tegrastats nothing."""
    return "yes\n" if command[0] == "timedatectl" else ""


def read(root: Path, ask: Callable[[Sequence[str]], str] = answer, gpu: Gpu = ORIN_GPU) -> Machine:
    """Return the machine whose files lie below a folder."""
    return read_machine(root, ask, lambda: UNKNOWN, lambda: gpu)


def board(root: Path, name: str, changes: Mapping[str, str] | None = None) -> Machine:
    """Write a good board with some files changed, and read it."""
    files = BOARDS[name]()
    return read(
        write(root, files | dict(changes or {})), gpu=THOR_GPU if name == "thor" else ORIN_GPU
    )


def to_mend(findings: tuple[BoardFinding, ...]) -> dict[str, BoardFinding]:
    return {finding.what: finding for finding in findings if finding.remedy}

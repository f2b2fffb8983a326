"""The noun `BoardState`: the machine a latency was measured on. Reading it never fails.

Only /proc, /sys and /etc are read, below a root that tests replace. Nothing identifies the
machine: no host name, serial or address.
"""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qvla_export.errors import ArtifactError

_L4T = re.compile(r"R(\d+).*?REVISION:\s*([\d.]+)")


@dataclass(frozen=True)
class BoardState:
    """What can change a latency besides the policy; empty or None where it is not known."""

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
    memory_available_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "BoardState":
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: a field is missing.
        """
        names = [part.name for part in fields(cls)]
        if not isinstance(value, dict) or any(name not in value for name in names):
            raise ArtifactError(f"a board state needs {names}, got {value!r:.200}")
        lists = {name: tuple(value[name]) for name in ("governors", "cpu_mhz")}
        return cls(**{**{name: value[name] for name in names}, **lists})


def read_board_state(root: Path = Path("/")) -> BoardState:
    """Return the machine's state now; a file that cannot be read leaves its field empty."""
    cpuinfo = _text(root / "proc/cpuinfo")
    meminfo = _text(root / "proc/meminfo")
    l4t = _L4T.search(_text(root / "etc/nv_tegra_release"))
    cpus = root / "sys/devices/system/cpu"
    model = _text(root / "proc/device-tree/model") or _text(root / "sys/class/dmi/id/product_name")
    frequencies = [_number(text) for text in _per_core(cpus, "scaling_cur_freq")]
    listed_mhz = [_number(text) for text in re.findall(r"^cpu MHz\s*:\s*(\S+)", cpuinfo, re.M)]
    mhz = [khz / 1000 for khz in frequencies if khz is not None] or [
        value for value in listed_mhz if value is not None
    ]
    load = _text(root / "proc/loadavg").split()
    return BoardState(
        model=model,
        l4t=f"{l4t[1]}.{l4t[2]}" if l4t else "",
        kernel=_text(root / "proc/sys/kernel/osrelease"),
        cpu_model=_field(cpuinfo, "model name"),
        cores=len(re.findall(r"^processor\s*:", cpuinfo, re.M)),
        governors=tuple(sorted({*_per_core(cpus, "scaling_governor")})),
        cpu_mhz=tuple(round(value, 1) for value in mhz),
        load_1m=_number(load[0]) if load else None,
        memory_total_bytes=_kilobytes(meminfo, "MemTotal"),
        memory_available_bytes=_kilobytes(meminfo, "MemAvailable"),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip("\0 \n\t")
    except OSError:
        return ""


def _per_core(cpus: Path, name: str) -> list[str]:
    try:
        paths = sorted(cpus.glob(f"cpu[0-9]*/cpufreq/{name}"))
    except OSError:
        return []
    return [text for text in map(_text, paths) if text]


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.+)$", text, re.M)
    return match[1].strip() if match else ""


def _kilobytes(text: str, name: str) -> int | None:
    match = re.search(rf"^{name}:\s*(\d+) kB", text, re.M)
    return int(match[1]) * 1024 if match else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value == value and abs(value) != float("inf") else None

"""The noun `Gpu`: which NVIDIA GPU this machine has, asked of the driver; no other library."""

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
# At the start of its line: a mode behind "#" is none.
_MODE = re.compile(r"^[ \t]*<[ \t]*POWER_MODEL[ \t]+([^>\n]*)>", re.M)
_MODE_ID = re.compile(r"\bID=(\d{1,9})\b")
_MODE_NAME = re.compile(r"\bNAME=(\S+)")


@dataclass(frozen=True)
class Gpu:
    """A GPU that the driver offers."""

    # "NVIDIA GeForce RTX 4070", "Orin".
    name: str
    # "sm_89".
    compute_capability: str


def find_gpu() -> Gpu | None:
    """Return the first GPU; None without a driver or a device."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return None
    name = ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else Gpu(name.value.decode(), f"sm_{major.value}{minor.value}")


def read_power_mode(root: Path = Path("/")) -> str | None:
    """Return a Jetson's power mode by name ("MAXN"), or its number; None elsewhere.

    nvpmodel's service keeps "pmode:0000" in its status file and the names in its configuration.
    """
    try:
        status = (root / "var/lib/nvpmodel/status").read_text(errors="replace")
    except OSError:
        return None
    number = re.search(r"pmode:\s*(\d{1,9})", status)
    if number is None:
        return None
    return read_power_modes(root).get(int(number[1]), number[1])


def read_power_modes(root: Path = Path("/")) -> dict[int, str]:
    """Return the names of a Jetson's power modes by number; none elsewhere."""
    try:
        return power_modes_of((root / "etc/nvpmodel.conf").read_text(errors="replace"))
    except OSError:
        return {}


def power_modes_of(text: str) -> dict[int, str]:
    """Return the names of the power modes that a configuration of nvpmodel lists, by number."""
    read = {}
    for attributes in _MODE.findall(text):
        number, name = _MODE_ID.search(attributes), _MODE_NAME.search(attributes)
        if number is not None and name is not None:
            read[int(number[1])] = name[1]
    return read

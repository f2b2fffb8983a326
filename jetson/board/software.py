"""What is installed on a board: Jetson Linux, JetPack, TensorRT, the module's part number."""

import importlib.metadata
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from jetson.board.files import text_of

_L4T = re.compile(r"R(\d+).*?REVISION:\s*([\d.]+)")
_MODULE = re.compile(r"\bp(?:3701|3767|3834|2888|3668)-\d{4}\b")
_PACKAGE = re.compile(
    r"^Package: (nvidia-jetpack|nvidia-l4t-core|tensorrt|libnvinfer\d+)$((?:\n.+)*)", re.M
)
# A package that was removed keeps its paragraph: "deinstall ok config-files".
_INSTALLED = re.compile(r"^Status: \S+ \S+ installed$", re.M)
_VERSION = re.compile(r"^Version: (\S+)$", re.M)
# Jetson Linux -> JetPack, where the package `nvidia-jetpack` is not installed.
_JETPACKS = {
    "34.1.0": "5.0 DP", "34.1.1": "5.0.1 DP",
    "35.1.0": "5.0.2", "35.2.1": "5.1", "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5.0": "5.1.3",
    "35.6.0": "5.1.4", "35.6.1": "5.1.5", "35.6.2": "5.1.5", "35.6.3": "5.1.5", "35.6.4": "5.1.6",
    "36.2.0": "6.0 DP",
    "36.3.0": "6.0", "36.4.0": "6.1", "36.4.2": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1",
    "36.4.7": "6.2.1", "36.5.0": "6.2.2", "38.2.0": "7.0", "38.2.1": "7.0", "38.2.2": "7.0",
    "38.4.0": "7.1", "39.2.0": "7.2", "39.2.2": "7.2.2",
}  # fmt: skip


def read_l4t(root: Path) -> str:
    """Return the Jetson Linux release, "36.4.3"; empty elsewhere."""
    release = _L4T.search(text_of(root / "etc/nv_tegra_release"))
    if release:
        return f"{release[1]}.{release[2]}"
    # Containers have the package at best: 36.4.3-20250107174145.
    return _packages(root).get("nvidia-l4t-core", "").partition("-")[0]


def read_jetpack(root: Path, l4t: str) -> str:
    """Return the JetPack version, "6.2": of its package, else the one a release belongs to.

    A developer preview's package has the version of the release that follows: "6.0 DP" is said
    wherever Jetson Linux is the preview's.
    """
    installed = re.split(r"[+-]", _packages(root).get("nvidia-jetpack", ""))[0]
    released = _JETPACKS.get(_three_parts(l4t), "")
    return released if released == f"{installed} DP" else installed or released


def read_tensorrt(root: Path) -> str:
    """Return TensorRT's version, "10.3.0.30"; empty where it is not installed."""
    packages = _packages(root)
    names = sorted((name for name in packages if name.startswith("libnvinfer")), reverse=True)
    for name in ("tensorrt", *names):
        if name in packages:
            return re.split(r"[+-]", packages[name])[0]
    if root == Path("/"):
        for name in ("tensorrt", "tensorrt_rtx"):
            with suppress(importlib.metadata.PackageNotFoundError):
                return f"{importlib.metadata.version(name)} ({name})"
    return ""


def read_module(root: Path) -> str:
    """Return the part number of a Jetson module, "p3701-0005"; empty elsewhere."""
    found = _MODULE.search(text_of(root / "proc/device-tree/compatible").replace("\0", " "))
    return found[0] if found else ""


def _three_parts(version: str) -> str:
    return ".".join([*version.split("."), "0", "0"][:3]) if version else ""


def _packages(root: Path) -> dict[str, str]:
    """Return the versions of NVIDIA's packages that are installed."""
    path = root / "var/lib/dpkg/status"
    try:
        state = path.stat()
    except OSError:
        return {}
    return _read_packages(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _read_packages(path: Path, mtime_ns: int, nbytes: int) -> dict[str, str]:
    # Megabytes on a board: read again only when something was installed.
    read = {}
    for name, paragraph in _PACKAGE.findall(text_of(path)):
        version = _VERSION.search(paragraph)
        if version is not None and _INSTALLED.search(paragraph):
            read[name] = version[1]
    return read

"""The noun `Bsp`: an unpacked BSP of Jetson Linux and what its own files say of it.

Layout: NVIDIA Jetson Linux Developer Guide, Quick Start and Flashing Support, r36 and r39. Nothing
of a BSP is executed here.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from engines.targets import ORIN_JP6, ORIN_JP7
from jetson.board.software import read_l4t
from qvla_export.pipeline.flash.refusal import FlashRefused

FLASH_TOOL = "tools/kernel_flash/l4t_initrd_flash.sh"
OTA_TOOL = "tools/ota_tools/version_upgrade/l4t_generate_ota_package.sh"
OTA_BOARDS = "tools/ota_tools/version_upgrade/ota_board_specs.conf"
_VERSION = re.compile(r"^BSP_(BRANCH|MAJOR|MINOR)=(\d{1,6})\s*$", re.M)
_SOURCE = re.compile(r"^\s*(?:source|\.)\s+\"?\$\{?LDK_DIR\}?/([\w.+-]+)\"?", re.M)
# The module of an AGX Orin; a developer kit may also be flashed to behave like an Orin NX.
_MODULE, _OTHER_MODULE = "p3701", "-as-p3767"
# First Jetson Linux of a JetPack that a target is for, up to the next branch.
_JETPACKS = {(36, 4): ("6", ORIN_JP6.name), (39, 2): ("7", ORIN_JP7.name)}


@dataclass(frozen=True)
class Bsp:
    """A folder Linux_for_Tegra with a root file system in it."""

    root: Path
    # Jetson Linux, "36.4.3".
    l4t: str
    # "6" or "7", and the target of its bundles.
    jetpack: str
    target: str

    @property
    def rootfs(self) -> Path:
        """The root file system that boards get."""
        return self.root / "rootfs"

    @staticmethod
    def read(root: Path) -> "Bsp":
        """Read what a BSP says of itself.

        Raises:
            FlashRefused: it is none, is not complete, or is of a JetPack that no target is for.
        """
        found = dict(_VERSION.findall(_text(root / "nv_tegra/bsp_version")))
        if len(found) != 3 or not (root / "bootloader").is_dir():
            raise FlashRefused(
                "no bsp",
                f"{root} must be an unpacked Linux_for_Tegra, with nv_tegra/bsp_version and "
                "bootloader/; unpack it: sudo tar xpf Jetson_Linux_R*_aarch64.tbz2",
            )
        l4t = ".".join(found[part] for part in ("BRANCH", "MAJOR", "MINOR"))
        _require_complete(root, l4t)
        jetpack, target = _jetpack(int(found["BRANCH"]), int(found["MAJOR"]), l4t)
        return Bsp(root, l4t, jetpack, target)

    def boards(self) -> tuple[str, ...]:
        """Return the names of the AGX Orins that it can flash."""
        names = sorted(path.stem for path in self.root.glob("*.conf"))
        return tuple(name for name in names if self._is_agx_orin(name))

    def require_board(self, board: str) -> None:
        """Refuse a board that is not configured here, or is no AGX Orin.

        Raises:
            FlashRefused: "wrong board", with the names that fit.
        """
        known = (self.root / f"{board}.conf").is_file()
        if known and "/" not in board and self._is_agx_orin(board):
            return
        what = "is no AGX Orin (module p3701)" if known else "has no configuration in this BSP"
        devkits = [name for name in self.boards() if name.startswith("jetson-")]
        raise FlashRefused(
            "wrong board", f"{board!r:.80} {what}; take one of {devkits or list(self.boards())}"
        )

    def require_tool(self, name: str, remedy: str) -> None:
        """Refuse a BSP without one of its scripts.

        Raises:
            FlashRefused: "missing tool".
        """
        if not (self.root / name).is_file():
            raise FlashRefused("missing tool", f"{self.root / name} is not there; {remedy}")

    def _is_agx_orin(self, board: str) -> bool:
        """Say whether a board's configuration, with all that it takes in, is of an AGX Orin."""
        waiting, seen = [f"{board}.conf"], set[str]()
        while waiting:
            path = self.root / waiting.pop()
            # The configurations of a BSP are links to those by part number.
            if path.name in seen or not path.is_file():
                continue
            seen |= {path.name, path.resolve().name}
            waiting += _SOURCE.findall(_text(path))
        return any(_MODULE in name for name in seen) and not any(_OTHER_MODULE in n for n in seen)


def _require_complete(root: Path, l4t: str) -> None:
    rootfs = root / "rootfs"
    if not (root / "kernel/Image").is_file():
        raise FlashRefused(
            "missing kernel",
            f"{root / 'kernel/Image'} is not there; unpack the BSP again, or build the kernel",
        )
    if not (rootfs / "etc/passwd").is_file():
        raise FlashRefused(
            "missing rootfs",
            f"{rootfs} holds no system; sudo tar xpf "
            f"Tegra_Linux_Sample-Root-Filesystem_R{l4t}_aarch64.tbz2 -C {rootfs}",
        )
    if rootfs.stat().st_uid != 0:
        raise FlashRefused(
            "not root's",
            f"{rootfs} belongs to user {rootfs.stat().st_uid}: the robot's files would too; unpack "
            "it with sudo, and run this with sudo",
        )
    installed = read_l4t(rootfs)
    if not installed:
        raise FlashRefused(
            "binaries not applied",
            f"{rootfs} has no NVIDIA packages yet; cd {root} && sudo ./apply_binaries.sh",
        )
    if installed != l4t:
        raise FlashRefused(
            "binaries not applied",
            f"the BSP is Jetson Linux {l4t}, its rootfs has {installed}; unpack a rootfs of {l4t} "
            "and run sudo ./apply_binaries.sh",
        )


def _jetpack(branch: int, major: int, l4t: str) -> tuple[str, str]:
    for (first, oldest), found in _JETPACKS.items():
        if branch == first and major >= oldest:
            return found
    raise FlashRefused(
        "wrong jetpack",
        f"no target is for Jetson Linux {l4t}; take a BSP of JetPack 6.1 or later (36.4), or of "
        "7.2 or later (39.2)",
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

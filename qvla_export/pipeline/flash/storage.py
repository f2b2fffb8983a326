"""The noun `Storage`: where a board's system goes, and the BSP's layout of partitions for it."""

import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from qvla_export.pipeline.flash.bsp import Bsp
from qvla_export.pipeline.flash.refusal import FlashRefused

_NVME = re.compile(r"nvme\d+n\d+(?=p\d+$)")
EMMC = "mmcblk0p1"
# JetPack 5's name of the folder is the second.
_BOOT_FOLDERS = ("bootloader/generic/cfg", "bootloader/t186ref/cfg")
_EXTERNAL_FOLDER = "tools/kernel_flash"
# Bytes that a file system needs beside those of its files.
_SPARE_SHARE = 1.1


@dataclass(frozen=True)
class Storage:
    """A partition for the system, and the layouts that make it."""

    # "nvme0n1p1"; "mmcblk0p1" is the module's own eMMC.
    device: str
    # Whether there are two systems, of which an update writes the one that does not run.
    rootfs_ab: bool
    # Below the BSP. The layout with the partitions APP; and QSPI's, where that is another.
    layout: str
    boot_layout: str
    # Bytes of APP, where the layout says a number.
    app_bytes: int | None

    @property
    def is_external(self) -> bool:
        """Whether it is no part of the module."""
        return self.device != EMMC

    @property
    def disk(self) -> str:
        """The device without its partition."""
        return self.device.removesuffix("p1") if self.is_external else "mmcblk0"


def find_storage(bsp: Bsp, device: str, rootfs_ab: bool) -> Storage:
    """Return a storage as this BSP lays it out.

    Raises:
        FlashRefused: "wrong storage" or "missing layout".
    """
    if device != EMMC and _NVME.match(device) is None:
        raise FlashRefused(
            "wrong storage",
            f"{device!r:.40} is no partition of an NVMe drive (nvme0n1p1) or of the eMMC ({EMMC})",
        )
    ending = "_rootfs_ab" if rootfs_ab else ""
    if device == EMMC:
        names = [f"{folder}/flash_t234_qspi_sdmmc{ending}.xml" for folder in _BOOT_FOLDERS]
        layout = boot = _first(bsp, names)
    else:
        names = [f"{_EXTERNAL_FOLDER}/flash_l4t_t234_nvme{ending}.xml"]
        names += [] if rootfs_ab else [f"{_EXTERNAL_FOLDER}/flash_l4t_external.xml"]
        layout = _first(bsp, names)
        boot = _first(bsp, [f"{folder}/flash_t234_qspi.xml" for folder in _BOOT_FOLDERS])
        _partitions(bsp.root / boot)
    found = _partitions(bsp.root / layout)
    wanted = {"APP", "APP_b"} if rootfs_ab else {"APP"}
    if missing := sorted(wanted - set(found)):
        raise FlashRefused(
            "missing layout",
            f"{bsp.root / layout} has no partition {' or '.join(missing)}; take the file from the "
            "BSP again",
        )
    return Storage(device, rootfs_ab, layout, boot, found["APP"])


def require_room(storage: Storage, system_bytes: int, app_gib: int | None) -> None:
    """Refuse a system that does not fit into its partition.

    Args:
        storage: with the layout's own size.
        system_bytes: of all files of the root file system.
        app_gib: size of the partition that is asked for instead, GiB.

    Raises:
        FlashRefused: "no space".
    """
    room = storage.app_bytes if app_gib is None else app_gib << 30
    if room is not None and system_bytes * _SPARE_SHARE > room:
        least = int(system_bytes * _SPARE_SHARE / (1 << 30)) + 1
        raise FlashRefused(
            "no space",
            f"the system has {system_bytes / 1e9:.1f} GB, its partition {room / 1e9:.1f} GB; give "
            f"--app-gib {least} or more",
        )


def _first(bsp: Bsp, names: list[str]) -> str:
    for name in names:
        if (bsp.root / name).is_file():
            return name
    raise FlashRefused(
        "missing layout",
        f"none of {names} is in {bsp.root}; take a BSP of Jetson Linux that has it, or another "
        "--storage, or leave --rootfs-ab out",
    )


def _partitions(path: Path) -> dict[str, int | None]:
    """Return a layout's partitions with their bytes; None where a script fills them in."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise FlashRefused(
            "missing layout", f"{path} cannot be read ({error}); take it from the BSP again"
        ) from None
    found: dict[str, int | None] = {}
    for one in root.iter("partition"):
        size = (one.findtext("size") or "").strip()
        found[one.get("name", "")] = int(size) if size.isdigit() else None
    return found

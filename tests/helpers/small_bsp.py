"""A BSP of Jetson Linux with a file of each kind that is looked at; its scripts only record."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_board import ORIN_MODES

from qvla_export.pipeline.flash.refusal import FlashRefused

FLASH = "tools/kernel_flash/l4t_initrd_flash.sh"
OTA = "tools/ota_tools/version_upgrade/l4t_generate_ota_package.sh"
OTA_BOARDS = "tools/ota_tools/version_upgrade/ota_board_specs.conf"
ORIN, NANO = "jetson-agx-orin-devkit", "jetson-orin-nano-devkit"
_RECORD = """#!/bin/sh
exec > "$RECORD"
pwd
env | grep -E '^(ROOTFS_AB|BASE_BSP|TARGET_BSP)='
for word in "$@"; do echo "$word"; done
exit ${FAILS:-0}
"""


def layout(*names: str, app_bytes: str = "APPSIZE") -> str:
    rows = "".join(
        f'<partition name="{name}" type="data"><size> {app_bytes} </size></partition>'
        for name in names
    )
    return (
        '<?xml version="1.0"?>\n<!-- NVIDIA Tegra Partition Layout Version 01.00.0000 -->\n'
        f'<partition_layout version="01.00.0000"><device type="nvme" instance="4">{rows}'
        "</device></partition_layout>\n"
    )


def new_bsp(root: Path, l4t: str = "39.2.0") -> Path:
    """Write a miniature Linux_for_Tegra, applied binaries and all; return its folder."""
    branch, major, minor = l4t.split(".")
    files = {
        "nv_tegra/bsp_version": f"# version\nBSP_BRANCH={branch}\nBSP_MAJOR={major}\n"
        f'BSP_MINOR={minor}\nBSP_VERSION="${{BSP_BRANCH}}.${{BSP_MAJOR}}"\n',
        "kernel/Image": "kernel",
        "p3737-0000-p3701-0000.conf": 'source "${LDK_DIR}/p3737-0000-p3701-0000.conf.common";\n',
        "p3737-0000-p3701-0000.conf.common": 'source "${LDK_DIR}/p3701.conf.common";\n',
        "p3701.conf.common": "ODMDATA=;\n",
        "p3737-0000-p3701-0000-as-p3767-0000.conf": 'source "${LDK_DIR}/p3701.conf.common";\n',
        "p3768-0000-p3767-0000-a0.conf": 'source "${LDK_DIR}/p3767.conf.common";\n',
        "p3767.conf.common": "ODMDATA=;\n",
        "tools/kernel_flash/flash_l4t_t234_nvme.xml": layout("APP", "recovery", "UDA"),
        "tools/kernel_flash/flash_l4t_t234_nvme_rootfs_ab.xml": layout("APP", "APP_b", "UDA"),
        "bootloader/generic/cfg/flash_t234_qspi.xml": layout("A_mb1", "B_mb1"),
        "bootloader/generic/cfg/flash_t234_qspi_sdmmc.xml": layout("A_mb1", "B_mb1", "APP"),
        FLASH: _RECORD,
        OTA: _RECORD,
        OTA_BOARDS: "jetson_agx_orin_devkit_ota_nvme_r36_spec=(\n'boardid=3701;rootdev=nvme;'\n)\n",
        "rootfs/etc/passwd": "root:x:0:0::/root:/bin/sh\nnvidia:x:1000:1000::/home/n:/bin/sh\n",
        "rootfs/etc/nv_tegra_release": f"# R{branch} (release), REVISION: {major}.{minor}, GCID: 1"
        ", BOARD: generic, EABI: aarch64, DATE: x\n",
        "rootfs/etc/nvpmodel/nvpmodel_p3701_0000.conf": ORIN_MODES,
        "rootfs/etc/machine-id": "0123456789abcdef0123456789abcdef\n",
        "rootfs/etc/ssh/ssh_host_ed25519_key": "secret of the image\n",
        "rootfs/etc/ssh/ssh_host_ed25519_key.pub": "public of the image\n",
        "rootfs/etc/ssh/sshd_config": "UsePAM yes\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "rootfs/etc/systemd/system").mkdir(parents=True)
    (root / "rootfs/var/lib").mkdir(parents=True)
    for script in (FLASH, OTA):
        (root / script).chmod(0o755)
    links = {
        ORIN: "p3737-0000-p3701-0000",
        "jetson-agx-orin-devkit-as-nx-16gb": "p3737-0000-p3701-0000-as-p3767-0000",
        NANO: "p3768-0000-p3767-0000-a0",
    }
    for name, real in links.items():
        (root / f"{name}.conf").symlink_to(f"{real}.conf")
    return root


def runtime(
    path: Path,
    jetpack: str = "7",
    onnxruntime: str = "1.32.0",
    text: str = "#!/bin/sh\nexit 0\n",
    **more: Any,
) -> Path:
    """Write a file that stands for a runtime, and its description."""
    path.write_text(text)
    described = {
        "format": "qvla-runtime-1",
        "system": f"JetPack {jetpack}",
        "python": {"6": "3.10", "7": "3.12"}[jetpack],
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "own_python_sha256": None,
        "packages": {"onnxruntime": onnxruntime},
        **more,
    }
    path.with_suffix(".json").write_text(json.dumps(described))
    return path


def waiting_board(machine: Path, product: str) -> Path:
    """Write the USB devices of a machine, one of NVIDIA's among them."""
    for place, ids in (("1-1", ("046d", "c52b")), ("1-2", ("0955", product))):
        folder = machine / "sys/bus/usb/devices" / place
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(("idVendor", "idProduct"), ids, strict=True):
            (folder / name).write_text(f"{value}\n")
    return machine


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    """Return every path below a folder: kind, mode, owner, contents."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            state = path.lstat()
            what: object = None
            if path.is_symlink():
                what = str(path.readlink())
            elif path.is_file():
                what = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(root))] = (state.st_mode, state.st_uid, what)
    return found


def reason_of(act: Callable[[], object]) -> str:
    """Return the name under which a step refuses."""
    with pytest.raises(FlashRefused) as refused:
        act()
    assert str(refused.value).startswith(f"{refused.value.reason}: ")
    return refused.value.reason

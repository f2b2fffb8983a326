"""`prepare_bsp` refuses a BSP, a request or a runtime that does not fit, before it writes."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_bsp import (
    FLASH,
    NANO,
    ORIN,
    layout,
    new_bsp,
    reason_of,
    runtime,
    snapshot,
)

from qvla_export.pipeline.flash.overlay import Overlay
from qvla_export.pipeline.flash.preparation import (
    PrepareRequest,
    prepare_bsp,
    take_overlay_back,
)
from qvla_export.pipeline.flash.refusal import FlashRefused
from qvla_export.shared.errors import ArtifactError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a root file system belongs to root")


def change(path: Path, text: str | None) -> None:
    if text is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# What is wrong with a BSP -> the file, what it says then, and the reason's name.
DAMAGE: dict[str, tuple[str, str | None, str]] = {
    "no version": ("nv_tegra/bsp_version", None, "no bsp"),
    "no number": ("nv_tegra/bsp_version", "BSP_BRANCH=thirty\n", "no bsp"),
    "no bootloader": ("bootloader", None, "no bsp"),
    "no kernel": ("kernel/Image", None, "missing kernel"),
    "no system": ("rootfs/etc/passwd", None, "missing rootfs"),
    "no packages": ("rootfs/etc/nv_tegra_release", None, "binaries not applied"),
    "other packages": (
        "rootfs/etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, x", "binaries not applied",
    ),
    "no script": (FLASH, None, "missing tool"),
    "no layout": ("tools/kernel_flash/flash_l4t_t234_nvme.xml", None, "missing layout"),
    "no XML": ("tools/kernel_flash/flash_l4t_t234_nvme.xml", "<a>", "missing layout"),
    "no APP": ("tools/kernel_flash/flash_l4t_t234_nvme.xml", layout("UDA"), "missing layout"),
    "no QSPI": ("bootloader/generic/cfg/flash_t234_qspi.xml", None, "missing layout"),
    "small APP": (
        "tools/kernel_flash/flash_l4t_t234_nvme.xml", layout("APP", app_bytes="64"), "no space",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_bsp_that_lacks_something(what: str, request_of: PrepareRequest) -> None:
    name, text, reason = DAMAGE[what]
    change(request_of.bsp / name, text)
    before = snapshot(request_of.bsp)
    assert reason_of(lambda: prepare_bsp(request_of)) == reason
    assert snapshot(request_of.bsp) == before


# What is asked for -> the reason's name and a word of the message.
WISHES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a Nano": ({"board": NANO}, "wrong board", ORIN),
    "an Orin as an NX": ({"board": f"{ORIN}-as-nx-16gb"}, "wrong board", ORIN),
    "no board": ({"board": "jetson-agx-xavier-devkit"}, "wrong board", "no configuration"),
    "a path": ({"board": f"../Linux_for_Tegra/{ORIN}"}, "wrong board", ORIN),
    "a disk": ({"storage": "sda1"}, "wrong storage", "nvme0n1p1"),
    "a whole drive": ({"storage": "nvme0n1"}, "wrong storage", "nvme0n1p1"),
    "eMMC twice": ({"storage": "mmcblk0p1", "rootfs_ab": True}, "missing layout", "rootfs-ab"),
    "a mode": ({"power_mode": 9}, "wrong power mode", "MODE_50W"),
    "JetPack 6's": ({"target": "orin-jp6"}, "wrong jetpack", "39.2.0"),
    "its release": ({"release": "pick-orin-jp6"}, "wrong jetpack", "JetPack 7"),
    "none such": ({"target": "rtx4070"}, "wrong jetpack", "orin-jp7"),
}  # fmt: skip


@pytest.mark.parametrize("what", WISHES)
def test_what_does_not_fit_is_refused(what: str, request_of: PrepareRequest) -> None:
    changes, reason, word = WISHES[what]
    with pytest.raises(FlashRefused, match=word) as refused:
        prepare_bsp(replace(request_of, **changes))
    assert refused.value.reason == reason
    overlay = Overlay.load(request_of.bsp)
    assert overlay is None or not overlay.release


@pytest.mark.parametrize("l4t", ["36.3.0", "38.4.0", "35.5.0", "40.1.0"])
def test_a_jetson_linux_without_a_target(l4t: str, request_of: PrepareRequest) -> None:
    shutil.rmtree(request_of.bsp)
    new_bsp(request_of.bsp, l4t)
    assert reason_of(lambda: prepare_bsp(request_of)) == "wrong jetpack"


def test_jetpack_6_wants_its_own(request_of: PrepareRequest, tmp_path: Path) -> None:
    shutil.rmtree(request_of.bsp)
    new_bsp(request_of.bsp, "36.4.3")
    assert reason_of(lambda: prepare_bsp(request_of)) == "wrong runtime"
    older = replace(request_of, runtime=runtime(tmp_path / "jp6.pex", "6", "1.23.0"))
    assert prepare_bsp(older).overlay.release_name == "pick-orin-jp6"
    # What its Python has no ONNX Runtime for.
    assert reason_of(lambda: prepare_bsp(replace(older, target="cpu"))) == "wrong jetpack"
    take_overlay_back(request_of.bsp)
    newer = runtime(tmp_path / "own.pex", "6", "1.32.0", own_python_sha256="ab" * 32)
    prepared = prepare_bsp(replace(older, target="cpu", runtime=newer))
    assert prepared.overlay.target == "cpu" and "Python" in prepared.notes[0]


def test_a_runtime_is_what_is_described(request_of: PrepareRequest) -> None:
    request_of.runtime.write_bytes(b"something else")
    assert reason_of(lambda: prepare_bsp(request_of)) == "wrong runtime"
    request_of.runtime.with_suffix(".json").write_text("[]")
    assert reason_of(lambda: prepare_bsp(request_of)) == "wrong runtime"
    request_of.runtime.with_suffix(".json").unlink()
    with pytest.raises(ArtifactError, match="description of the runtime"):
        prepare_bsp(request_of)


def test_a_rootfs_unpacked_without_sudo(request_of: PrepareRequest) -> None:
    os.chown(request_of.bsp / "rootfs", 1000, 1000)
    assert reason_of(lambda: prepare_bsp(request_of)) == "not root's"


def test_a_store_of_somebody_else_stays(request_of: PrepareRequest) -> None:
    (request_of.bsp / "rootfs/var/lib/qvla").mkdir()
    assert reason_of(lambda: prepare_bsp(request_of)) == "foreign file"


def test_nobody_to_log_in_is_said(request_of: PrepareRequest) -> None:
    (request_of.bsp / "rootfs/etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    assert "l4t_create_default_user.sh" in prepare_bsp(request_of).notes[0]


@pytest.mark.parametrize("name", ["opt", "var/lib", "etc/systemd"])
def test_a_link_of_the_rootfs_does_not_lead_to_this_machine(
    name: str, request_of: PrepareRequest, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    place = request_of.bsp / "rootfs" / name
    if place.is_dir():
        shutil.rmtree(place)
    place.symlink_to(outside)
    assert reason_of(lambda: prepare_bsp(request_of)) == "foreign file"
    assert not list(outside.iterdir())

"""What a BSP is prepared with must fit it: the runtime, the power mode, room on the disk."""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.targets import CPU
from engines.trt.gpu import power_modes_of
from engines.trt.modules import admits
from qvla_export.pipeline.flash.bsp import Bsp
from qvla_export.pipeline.flash.refusal import FlashRefused
from qvla_export.pipeline.runtime.robot_runtime import FORMAT as RUNTIME_FORMAT
from qvla_export.shared.artifacts import read_json, sha256_file

# Of a file's bytes: what its disk must have free.
_SPARE_SHARE = 1.1


def require_runtime(path: Path, bsp: Bsp, target: str) -> tuple[str, tuple[str, ...]]:
    """Return a runtime's digest and what is to be said of it.

    Raises:
        FlashRefused: it is for another JetPack, is not the one described beside it, or cannot run
            the target's bundles.
    """
    described = path.with_suffix(".json")
    value: Any = read_json(described, "description of the runtime")
    if not isinstance(value, dict) or value.get("format") != RUNTIME_FORMAT:
        raise FlashRefused(
            "wrong runtime", f"{described} describes no runtime; qvla runtime build makes both"
        )
    build = f"qvla runtime build --jetpack {bsp.jetpack}"
    if value.get("system") != f"JetPack {bsp.jetpack}":
        raise FlashRefused(
            "wrong runtime",
            f"{path} is for {value.get('system')!r:.40}, the BSP is JetPack {bsp.jetpack} (Jetson "
            f"Linux {bsp.l4t}); {build}",
        )
    if (digest := sha256_file(path)) != value.get("sha256"):
        raise FlashRefused("wrong runtime", f"{path} is not what {described} describes; {build}")
    packages = value.get("packages")
    onnxruntime = packages.get("onnxruntime") if isinstance(packages, dict) else None
    if target == CPU.name and not (onnxruntime and admits(CPU.runtime_versions, str(onnxruntime))):
        raise FlashRefused(
            "wrong jetpack",
            f"bundles for {CPU.name} need ONNX Runtime {CPU.runtime_versions}, this runtime has "
            f"{onnxruntime}; take a release for {bsp.target}, or a runtime with a newer --python",
        )
    if target not in (CPU.name, bsp.target):
        raise FlashRefused(
            "wrong jetpack",
            f"releases for {target} do not run on JetPack {bsp.jetpack} (Jetson Linux {bsp.l4t}), "
            f"whose target is {bsp.target}; export and release for it, or take another BSP",
        )
    own = value.get("own_python_sha256")
    return digest, () if own is None else (
        f"the runtime wants a Python {value.get('python')} of its own on the robot (archive "
        f"{str(own)[:16]}): put it into the rootfs too",
    )


def require_power_mode(bsp: Bsp, mode: int | None) -> None:
    """Refuse a mode that the root file system's nvpmodel does not have; None is no mode.

    Raises:
        FlashRefused: "wrong power mode".
    """
    texts = [p.read_text(errors="replace") for p in bsp.rootfs.glob("etc/nvpmodel/*p3701*.conf")]
    known = {number: name for text in texts for number, name in power_modes_of(text).items()}
    if mode is not None and known and mode not in known:
        raise FlashRefused(
            "wrong power mode", f"nvpmodel has no mode {mode} on an AGX Orin; it has {known}"
        )


def require_free(rootfs: Path, nbytes: int) -> None:
    """Refuse a disk, that of the root file system, without room for a runtime of so many bytes.

    Raises:
        FlashRefused: "no space".
    """
    free = shutil.disk_usage(rootfs).free
    if free < nbytes * _SPARE_SHARE:
        raise FlashRefused(
            "no space",
            f"the runtime needs {nbytes / 1e6:.1f} MB on the disk of {rootfs}, {free / 1e6:.1f} MB "
            "are free; make room there",
        )


def surprises(bsp: Bsp) -> Iterator[str]:
    """Yield what does not keep from flashing and is a surprise afterwards."""
    accounts = (line.split(":") for line in (bsp.rootfs / "etc/passwd").read_text().splitlines())
    people = [a[0] for a in accounts if len(a) > 2 and a[2].isdigit() and 1000 <= int(a[2]) < 60000]
    if not people:
        yield (
            "the rootfs has no account to log in: the first boot asks for one on a screen and the "
            f"robot waits; cd {bsp.root} && sudo tools/l4t_create_default_user.sh -u NAME -p "
            "PASSWORD -n ROBOT --accept-license"
        )


def bytes_below(folder: Path) -> int:
    """Return the bytes of all files below a folder, those of several names once."""
    seen: dict[tuple[int, int], int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            found = Path(root, name).lstat()
            if stat.S_ISREG(found.st_mode):
                seen[found.st_dev, found.st_ino] = found.st_size
    return sum(seen.values())

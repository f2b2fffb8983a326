"""The step that lays an overlay on a BSP: what a flashed robot is to be, from its first boot on."""

import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jetson.install.garbage import collect
from jetson.install.installation import Installed, InstallRequest, install, remember
from jetson.install.release import RefusedRelease
from jetson.install.store import DEFAULT, NoSpace, Store
from jetson.install.units import UnitSettings, unit_files
from qvla_export.pipeline.flash.bsp import FLASH_TOOL, Bsp
from qvla_export.pipeline.flash.overlay import (
    Entry,
    LaidFile,
    Overlay,
    files_put_aside,
    lay,
    look,
    require_inside,
    take_back,
)
from qvla_export.pipeline.flash.refusal import FlashRefused
from qvla_export.pipeline.flash.requirements import (
    bytes_below,
    require_free,
    require_power_mode,
    require_runtime,
    surprises,
)
from qvla_export.pipeline.flash.storage import Storage, find_storage, require_room
from qvla_export.pipeline.progress import OnProgress, Progress, ignore

RUNTIME, UNPACK, PROGRAM = "opt/qvla/qvla.pex", "opt/qvla/unpack", "usr/local/bin/qvla"
# The Python of the runtime, once it is unpacked: what the units start.
PYTHON = Path("/opt/qvla/venv/bin/python")
# Once, as root: who serves may not write there. A Python of a link's place finds its packages.
_UNPACK_TEXT = f"""#!/bin/sh
# Written by qvla flash prepare: unpacks the runtime.
set -e
export PEX_ROOT=/opt/qvla/pex PEX_INTERPRETER=1
ln -sfn "$(/{RUNTIME} -c 'import sys; print(sys.prefix)')" /opt/qvla/venv
"""
_PROGRAM_TEXT = f"""#!/bin/sh
# Written by qvla flash prepare: starts QVLA in the runtime's own Python.
[ -x {PYTHON} ] || /{UNPACK}
exec {PYTHON} -m qvla_export "$@"
"""
_UNITS = "etc/systemd/system"
# What `systemctl enable` would link a unit to; of timers there is the one that pulls.
_WANTED_BY = re.compile(r"^WantedBy=(\S+)$", re.MULTILINE)
_TIMERS = "timers.target"


@dataclass(frozen=True)
class PrepareRequest:
    """What a BSP is prepared with, and for."""

    bsp: Path
    # Folder of the repository, and the root that robots are to trust.
    repository: Path
    root: Path
    # As `qvla runtime build` made it, its .json beside it.
    runtime: Path
    board: str = "jetson-agx-orin-devkit"
    storage: str = "nvme0n1p1"
    rootfs_ab: bool = False
    # Size of the system's partition, GiB; None for the layout's.
    app_gib: int | None = None
    # Name, or start of the digest; None for the newest of the target.
    release: str | None = None
    # None for the one of the BSP's JetPack.
    target: str | None = None
    # URL that the robot pulls newer releases from; None for none.
    pull_from: str | None = None
    # nvpmodel's mode, set at the first boot; None leaves it.
    power_mode: int | None = None
    port: int = 8000
    # Account that serves; made at the first boot.
    user: str = "qvla"


@dataclass(frozen=True)
class PreparedBsp:
    """A BSP that is ready to be flashed."""

    overlay: Overlay
    jetpack: str
    storage: Storage
    # Paths that this preparation changed: none where all was so already.
    changed: tuple[str, ...]
    # What whoever flashes should know.
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        overlay = asdict(self.overlay)
        return {"jetpack": self.jetpack, "storage": asdict(self.storage), "overlay": overlay} | {
            "changed": list(self.changed),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """Return what people want to know of it."""
        one = self.overlay
        return [
            f"{one.board}, Jetson Linux {one.l4t} (JetPack {self.jetpack}), {one.device} by "
            f"{self.storage.layout}{', two systems (A/B)' if one.rootfs_ab else ''}",
            f"release {one.release_name} {one.release[:16]} for {one.target}, runtime "
            f"{one.runtime[:16]}",
            f"{len(one.files)} paths of the rootfs are the overlay's, {len(one.replaced)} files of "
            f"before are put aside; {len(self.changed)} changed now",
            *(f"note: {note}" for note in self.notes),
        ]


def prepare_bsp(request: PrepareRequest, on_progress: OnProgress = ignore) -> PreparedBsp:
    """Check a BSP and lay runtime, units, trusted keys and release on its root file system.

    Doing it again changes nothing. What does not fit is refused before anything is written; of
    the release it is known only when it is fetched, and the same call goes on.

    Raises:
        FlashRefused: by its name, with the remedy.
        RefusedRelease: the repository is not what the keys vouch for.
    """
    on_progress(Progress("checks"))
    bsp = Bsp.read(request.bsp.absolute())
    bsp.require_board(request.board)
    bsp.require_tool(FLASH_TOOL, "unpack the BSP again")
    storage = find_storage(bsp, request.storage, request.rootfs_ab)
    target = request.target or bsp.target
    runtime, notes = require_runtime(request.runtime, bsp, target)
    require_power_mode(bsp, request.power_mode)
    require_free(bsp.rootfs, request.runtime.stat().st_size)
    require_room(storage, bytes_below(bsp.rootfs), request.app_gib)
    before = _overlay_before(bsp)
    entries = list(_entries(request, bsp))
    overlay = Overlay(
        bsp.l4t, request.board, storage.device, storage.rootfs_ab, request.app_gib, target, "", "",
        runtime,
    )  # fmt: skip
    _leave(bsp, before, {entry.path for entry in entries})
    _save_intent(bsp, overlay, before, entries)
    on_progress(Progress("overlay"))
    laid = lay(bsp.root, bsp.rootfs, entries, before)
    on_progress(Progress("release"))
    installed = _install(request, bsp, target)
    files, folders = _store_files(bsp)
    overlay = replace(
        overlay,
        release=installed.digest,
        release_name=installed.name,
        files=(*(entry.laid() for entry in entries), *files),
        folders=tuple(dict.fromkeys((*laid.folders, *folders))),
        replaced=files_put_aside(bsp.root),
    )
    overlay.save(bsp.root)
    require_room(storage, bytes_below(bsp.rootfs), request.app_gib)
    changed = (*laid.changed, *_changed(files, before))
    return PreparedBsp(overlay, bsp.jetpack, storage, changed, (*notes, *surprises(bsp)))


def _overlay_before(bsp: Bsp) -> Overlay | None:
    """Return the overlay that is there; a store that is of none is somebody else's."""
    before = Overlay.load(bsp.root)
    place = bsp.rootfs / DEFAULT.relative_to("/")
    if before is None and os.path.lexists(place):
        raise FlashRefused(
            "foreign file",
            f"{place} is there and not of an overlay; remove it, or prepare a new rootfs",
        )
    return before


def take_overlay_back(root: Path) -> Overlay:
    """Let a BSP's root file system be what it was before it was prepared.

    Raises:
        FlashRefused: there is no overlay, or somebody changed it since.
    """
    bsp = Bsp.read(root.absolute())
    overlay = Overlay.load(bsp.root)
    if overlay is None:
        raise FlashRefused("no overlay", f"nothing was put on {bsp.rootfs}; qvla flash prepare")
    take_back(bsp.root, bsp.rootfs, overlay)
    return overlay


def _entries(request: PrepareRequest, bsp: Bsp) -> Iterator[Entry]:
    """Yield what is to be on the root file system beside the store."""
    yield Entry(RUNTIME, mode=0o755, source=request.runtime)
    yield Entry(UNPACK, mode=0o755, data=_UNPACK_TEXT.encode())
    yield Entry(PROGRAM, mode=0o755, data=_PROGRAM_TEXT.encode())
    settings = UnitSettings(PYTHON, DEFAULT, request.user, request.port, (), request.power_mode)
    for name, text in unit_files(settings).items():
        yield Entry(f"{_UNITS}/{name}", data=text.encode())
        starter = _WANTED_BY.search(text)
        if starter is not None and (starter[1] != _TIMERS or request.pull_from is not None):
            yield Entry(f"{_UNITS}/{starter[1]}.wants/{name}", "link", to=f"/{_UNITS}/{name}")
    drop_in = f"[Service]\nExecStartPre=/{UNPACK}\n"
    yield Entry(f"{_UNITS}/qvla-first-boot.service.d/flashed.conf", data=drop_in.encode())
    # Images are cloned: each robot makes itself an identity at its first boot (machine-id(5)).
    yield Entry("etc/machine-id", mode=0o444)
    for path in sorted((bsp.rootfs / "etc/ssh").glob("ssh_host_*_key*")):
        yield Entry(str(path.relative_to(bsp.rootfs)), "absent")
    before = Overlay.load(bsp.root)
    for one in before.files if before else ():
        if one.kind == "absent" and not os.path.lexists(bsp.rootfs / one.path):
            yield Entry(one.path, "absent")


def _leave(bsp: Bsp, before: Overlay | None, paths: set[str]) -> None:
    """Remove what an earlier preparation put there and this one does not want."""
    store = str(DEFAULT.relative_to("/"))
    for one in before.files if before else ():
        if one.path not in paths and one.kind != "absent" and not one.path.startswith(store):
            require_inside(bsp.rootfs, one.path).unlink(missing_ok=True)


def _save_intent(bsp: Bsp, overlay: Overlay, before: Overlay | None, entries: list[Entry]) -> None:
    """Write down what will be ours before it is there: an interrupted preparation is known."""
    ours = {one.path for one in before.files} if before else set[str]()
    fresh = [e.laid() for e in entries if look(bsp.rootfs, e.path).kind == "absent"]
    files = {one.path: one for one in (*(before.files if before else ()), *fresh)}
    if before is None or set(files) - ours:
        parents = {str(folder) for e in entries for folder in list(Path(e.path).parents)[:-1]}
        new = sorted(one for one in parents if not (bsp.rootfs / one).is_dir())
        folders = tuple(dict.fromkeys((*(before.folders if before else ()), *new)))
        replaced = files_put_aside(bsp.root)
        replace(
            before or overlay, files=tuple(files.values()), folders=folders, replaced=replaced
        ).save(bsp.root)


def _install(request: PrepareRequest, bsp: Bsp, target: str) -> Installed:
    """Bring the release into the robot's store as the robot would, checked against its keys."""
    place = require_inside(bsp.rootfs, str(DEFAULT.relative_to("/")))
    store = Store(place)
    install_request = InstallRequest(
        str(request.repository.absolute()), target, request.root, request.release
    )
    try:
        with store.open():
            installed = install(store, install_request)
            # Robots look for newer ones elsewhere than on this machine.
            remember(store, request.pull_from or "", target)
            collect(store, 0, "")
    except NoSpace as error:
        raise FlashRefused("no space", str(error)) from None
    except RefusedRelease as error:
        if error.reason != "wrong target":
            raise
        raise FlashRefused(
            "wrong jetpack",
            f"{error}. The BSP is Jetson Linux {bsp.l4t} (JetPack {bsp.jetpack}): take the BSP of "
            f"the release's JetPack, or a release for {target}",
        ) from None
    return installed


def _store_files(bsp: Bsp) -> tuple[tuple[LaidFile, ...], tuple[str, ...]]:
    """Return the files and folders of the store on the root file system."""
    store = bsp.rootfs / DEFAULT.relative_to("/")
    names = sorted(str(path.relative_to(bsp.rootfs)) for path in (store, *store.rglob("*")))
    looked = [look(bsp.rootfs, name) for name in names]
    return (
        tuple(one for one in looked if one.kind != "folder"),
        tuple(one.path for one in looked if one.kind == "folder"),
    )


def _changed(files: tuple[LaidFile, ...], before: Overlay | None) -> tuple[str, ...]:
    known = {one.path: one for one in (before.files if before else ())}
    return tuple(one.path for one in files if known.get(one.path) != one)

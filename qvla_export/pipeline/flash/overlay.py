"""The noun `Overlay`: what was put on a root file system, file by file, so that it can be undone.

What was there before lies beside the BSP's root file system, never in it, until it is taken back.
"""

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvla_export.pipeline.flash.refusal import FlashRefused
from qvla_export.shared.artifacts import (
    read_json,
    require_fields,
    sha256_file,
    write_json,
    write_pieces,
)
from qvla_export.shared.errors import ArtifactError

FORMAT = "qvla-overlay-1"
MANIFEST, REPLACED = "qvla-overlay.json", "qvla-replaced"
_CHUNK_BYTES = 1 << 20
_SHOWN = 8


@dataclass(frozen=True)
class Entry:
    """What a path of the root file system is to be."""

    # Below the root file system.
    path: str
    kind: Literal["file", "link", "absent"] = "file"
    mode: int = 0o644
    # A file's bytes: those, or those of another file.
    data: bytes = b""
    source: Path | None = None
    # Where a link leads.
    to: str = ""

    def laid(self) -> "LaidFile":
        """Return what the manifest says of it."""
        if self.kind != "file":
            return LaidFile(self.path, self.kind, self.to, 0)
        digest = sha256_file(self.source) if self.source else hashlib.sha256(self.data).hexdigest()
        return LaidFile(self.path, self.kind, digest, self.mode)


@dataclass(frozen=True)
class LaidFile:
    """A path as the overlay left it."""

    path: str
    kind: str
    # SHA-256 of a file, the place a link leads to.
    digest: str
    mode: int


@dataclass(frozen=True)
class Overlay:
    """What is on a root file system, and what it was made for; the manifest beside the BSP."""

    l4t: str
    board: str
    device: str
    rootfs_ab: bool
    # GiB of the system's partition; None for the layout's.
    app_gib: int | None
    target: str
    # Digest and name of the release, digest of the runtime.
    release: str
    release_name: str
    runtime: str
    files: tuple[LaidFile, ...] = ()
    # Folders that were not there.
    folders: tuple[str, ...] = ()
    # Paths whose files of before were put aside.
    replaced: tuple[str, ...] = ()
    format: str = field(default=FORMAT)

    def save(self, bsp: Path) -> None:
        """Write the manifest whole."""
        write_json(bsp / MANIFEST, asdict(self))

    @staticmethod
    def load(bsp: Path) -> "Overlay | None":
        """Read the manifest beside a BSP; None where nothing was put on it.

        Raises:
            ArtifactError: it is damaged or of another version.
        """
        path = bsp / MANIFEST
        if not path.is_file():
            return None
        value: Any = read_json(path, "overlay's manifest")
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ArtifactError(f"{path} must be of format {FORMAT!r}; unpack the rootfs anew")
        require_fields(value, Overlay.__dataclass_fields__, f"overlay's manifest {path}")
        try:
            files = tuple(LaidFile(**one) for one in value["files"])
            lists = {name: tuple(value[name]) for name in ("folders", "replaced")}
            paths = [*(one.path for one in files), *lists["folders"], *lists["replaced"]]
            if not all(_is_below(path) for path in paths):
                raise ValueError("a path leads out of the root file system")
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); unpack the rootfs anew") from None
        return Overlay(**{**value, **lists, "files": files})

    def changed(self, rootfs: Path) -> tuple[str, ...]:
        """Return the paths that are not as the overlay left them."""
        return tuple(one.path for one in self.files if look(rootfs, one.path) != one)


def look(rootfs: Path, path: str) -> LaidFile:
    """Return a path of a root file system as it is."""
    place = rootfs / path
    if place.is_symlink():
        return LaidFile(path, "link", str(place.readlink()), 0)
    if not place.is_file():
        return LaidFile(path, "folder" if place.is_dir() else "absent", "", 0)
    return LaidFile(path, "file", sha256_file(place), stat.S_IMODE(place.stat().st_mode))


def require_inside(rootfs: Path, path: str) -> Path:
    """Return where a path of a root file system lies on this machine.

    Links in it are the robot's: an absolute one leads to a folder of this machine.

    Raises:
        FlashRefused: "foreign file", it leads out.
    """
    place = rootfs / path
    if not place.parent.resolve().is_relative_to(rootfs.resolve()):
        raise FlashRefused(
            "foreign file",
            f"/{path} of the rootfs leads to {place.parent.resolve()} of this machine; make the "
            "link relative, or unpack the rootfs anew",
        )
    return place


def lay(bsp: Path, rootfs: Path, entries: Iterable[Entry], before: Overlay | None) -> "Laid":
    """Make paths what they are to be; what is so already is not touched.

    Args:
        bsp: beside whose root file system replaced files are put.
        rootfs: the root file system.
        entries: what is to be.
        before: the overlay that is there.
    """
    ours = {one.path for one in before.files} if before else set[str]()
    folders, changed = list(before.folders if before else ()), []
    for entry in entries:
        place = require_inside(rootfs, entry.path)
        if look(rootfs, entry.path) == entry.laid():
            continue
        if entry.path not in ours and os.path.lexists(place):
            _put_aside(bsp, rootfs, entry.path)
        folders += _new_folders(rootfs, place.parent)
        _write(place, entry)
        changed.append(entry.path)
    return Laid(tuple(changed), tuple(dict.fromkeys(folders)))


@dataclass(frozen=True)
class Laid:
    """What laying changed, and the folders that were made for it, then or before."""

    changed: tuple[str, ...]
    folders: tuple[str, ...]


def take_back(bsp: Path, rootfs: Path, overlay: Overlay) -> None:
    """Let a root file system be what it was before the overlay.

    Raises:
        FlashRefused: "changed overlay", somebody changed a file since; nothing was taken back.
    """
    lost = [path for path in overlay.replaced if not os.path.lexists(bsp / REPLACED / path)]
    if changed := [*overlay.changed(rootfs), *lost]:
        raise FlashRefused(
            "changed overlay",
            f"{len(changed)} files were changed since, {changed[:_SHOWN]}; prepare again first, or "
            "unpack the rootfs anew",
        )
    for path in (one.path for one in overlay.files if one.kind != "absent"):
        require_inside(rootfs, path).unlink()
    for path in overlay.replaced:
        shutil.move(bsp / REPLACED / path, require_inside(rootfs, path))
    for path in sorted(overlay.folders, key=len, reverse=True):
        with contextlib.suppress(OSError):  # somebody put something of their own there
            (rootfs / path).rmdir()
    shutil.rmtree(bsp / REPLACED, ignore_errors=True)
    (bsp / MANIFEST).unlink()


def files_put_aside(bsp: Path) -> tuple[str, ...]:
    """Return the paths whose files of before lie beside the BSP."""
    kept = bsp / REPLACED
    return tuple(
        sorted(str(p.relative_to(kept)) for p in kept.rglob("*") if p.is_symlink() or p.is_file())
    )


def _put_aside(bsp: Path, rootfs: Path, path: str) -> None:
    kept = bsp / REPLACED / path
    if os.path.lexists(kept):
        return  # what is there now is of a prepare that was interrupted
    # Host keys may be among them.
    (bsp / REPLACED).mkdir(mode=0o700, exist_ok=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(rootfs / path, kept)


def _new_folders(rootfs: Path, folder: Path) -> list[str]:
    """Make a folder and return what had to be made for it, below the root file system."""
    made = []
    for one in (folder, *folder.parents):
        if one == rootfs or one.is_dir():
            break
        made.append(str(one.relative_to(rootfs)))
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _write(place: Path, entry: Entry) -> None:
    if entry.kind != "file":
        place.unlink(missing_ok=True)
        if entry.kind == "link":
            place.symlink_to(entry.to)
        return
    if place.is_symlink():
        place.unlink()
    if entry.source is None:
        write_pieces(place, [entry.data])
    else:
        with entry.source.open("rb") as opened:
            write_pieces(place, iter(lambda: opened.read(_CHUNK_BYTES), b""))
    place.chmod(entry.mode)


def _is_below(path: object) -> bool:
    return isinstance(path, str) and not path.startswith("/") and ".." not in path.split("/")

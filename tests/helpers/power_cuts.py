"""Power cuts of a mounted ext4: its image is cloned at a moment, and the clone mounted again.

What the kernel had not written by then is lost, as it is with the power; the journal is replayed.
Wants root, loop devices, mkfs.ext4 and mkfs.xfs, whose files can be cloned.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FICLONE = 0x40049409
_HOST_BYTES, _DISK_BYTES = 1 << 30, 48 << 20


def why_not() -> str | None:
    """Return what this machine lacks for cutting the power; None if nothing."""
    if os.geteuid() != 0:
        return "power cuts want root, for loop mounts"
    if lacking := [name for name in ("mkfs.ext4", "mkfs.xfs") if shutil.which(name) is None]:
        return f"power cuts want {lacking} (apt install e2fsprogs xfsprogs)"
    if not Path("/dev/loop-control").exists():
        return "power cuts want loop devices"
    return None


@dataclass(frozen=True)
class Disk:
    """An ext4 in an image, mounted; and where a clone of it is mounted."""

    image: Path
    mounted: Path
    clones: Path

    @contextlib.contextmanager
    def cut(self) -> Iterator[Path]:
        """Yield the disk as it would be after a power cut at this moment."""
        clone = self.image.with_name("clone.img")
        with self.image.open("rb") as source, clone.open("wb") as target:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        with mount(clone, self.clones):
            yield self.clones
        clone.unlink()


@contextlib.contextmanager
def mount(image: Path, folder: Path, options: str = "") -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    words = ["mount", "-o", f"loop{options}", str(image), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def disk(work: Path) -> Iterator[Disk]:
    """Mount an ext4 whose image can be cloned."""
    host = work / "host.img"
    _new(host, _HOST_BYTES, ["mkfs.xfs", "-q", "-m", "reflink=1"])
    with mount(host, work / "host"):
        image = work / "host" / "disk.img"
        _new(image, _DISK_BYTES, ["mkfs.ext4", "-q", "-E", "lazy_itable_init=0"])
        # Names reach the journal every second, and nothing is flushed for careless programs.
        with mount(image, work / "disk", ",commit=1,noauto_da_alloc"):
            yield Disk(image, work / "disk", work / "clone")


def _new(image: Path, nbytes: int, make: list[str]) -> None:
    with image.open("wb") as file:
        file.truncate(nbytes)
    subprocess.run([*make, str(image)], check=True, capture_output=True)

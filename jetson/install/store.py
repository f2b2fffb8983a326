"""The noun `Store`: where a robot keeps its releases, and how its files come to be.

    trust/       anchor.json and what the repository's keys vouched for last: rollback protection
    blobs/       <sha256>, immutable, hard-linked into releases; .tmp-<sha256> is resumed
    releases/    <digest>/release.json and bundle/
    engines/     <bundle digest>/<fingerprint of this machine>/
    current, previous   symbolic links into releases/
    state.json   how far each release is, `jetson.install.store_state`
    robot.json   what this robot is and where it gets releases

Whatever has its name here is whole: files and folders are written beside under another name, synced
and renamed, and the folder that holds them is synced after.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jetson.install.release import BUNDLE
from qvla_export.shared.artifacts import sync_folder
from qvla_export.shared.errors import QvlaError

DEFAULT = Path("/var/lib/qvla")
TEMPORARY = ".tmp-"


class StoreError(QvlaError):
    """A robot's store is busy, is not one, or cannot do what it is told."""


class NoSpace(StoreError):
    """A release does not fit on the disk; nothing was written."""


@dataclass(frozen=True)
class Store:
    """A robot's folder of releases."""

    root: Path

    @property
    def trust(self) -> Path:
        """Folder of what the repository's keys vouched for."""
        return self.root / "trust"

    @property
    def blobs(self) -> Path:
        """Folder of files by digest."""
        return self.root / "blobs"

    @property
    def releases(self) -> Path:
        """Folder of releases by digest."""
        return self.root / "releases"

    @property
    def engines(self) -> Path:
        """Folder of engines by bundle and machine."""
        return self.root / "engines"

    @property
    def state(self) -> Path:
        """File of how far each release is."""
        return self.root / "state.json"

    @property
    def robot(self) -> Path:
        """File of what this robot is."""
        return self.root / "robot.json"

    def blob(self, sha256: str) -> Path:
        """Return where a file with this digest lies."""
        return self.blobs / sha256

    def release(self, digest: str) -> Path:
        """Return where a release lies."""
        return self.releases / digest

    def bundle(self, digest: str) -> Path:
        """Return where a release's bundle lies."""
        return self.release(digest) / BUNDLE

    def linked(self, link: str) -> str | None:
        """Return the digest of the release that "current" or "previous" names; None without one."""
        try:
            digest = (self.root / link).readlink().name
        except OSError:
            return None
        return digest if self.release(digest).is_dir() else None

    def point(self, link: str, digest: str | None) -> None:
        """Let "current" or "previous" name a release, or none, in one step."""
        path = self.root / link
        if digest is None:
            path.unlink(missing_ok=True)
        else:
            temporary = self.root / f"{TEMPORARY}{link}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(Path(self.releases.name) / digest)
            temporary.replace(path)
        sync_folder(self.root)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Hold the store for one command; folders are made, what a killed one left is removed.

        Raises:
            StoreError: another command holds it, or it cannot be written.
        """
        try:
            for folder in (self.root, self.trust, self.blobs, self.releases, self.engines):
                folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be written: {error.strerror}; run as the user that "
                "owns it, or give another --store"
            ) from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StoreError(
                    f"another command holds the store {self.root}; wait until it has ended"
                ) from None
            self._clean()
            yield
        finally:
            os.close(handle)

    def _clean(self) -> None:
        """Remove what has no name yet; downloads stay, they are resumed."""
        for folder in (self.root, self.releases, self.trust):
            for leftover in folder.glob(f"{TEMPORARY}*"):
                remove(leftover)


def is_released(bundle: Path) -> bool:
    """Return whether a bundle lies in a store, which takes only what somebody signed."""
    release = bundle.resolve().parent
    store = Store(release.parent.parent)
    return release.parent == store.releases and (store.trust / "anchor.json").is_file()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

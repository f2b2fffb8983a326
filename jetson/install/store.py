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
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetson.install.release import BUNDLE, RefusedRelease, Release
from qvla_export.shared.artifacts import MANIFEST, read_json, sync_folder
from qvla_export.shared.errors import ArtifactError, QvlaError

DEFAULT = Path("/var/lib/qvla")
TEMPORARY = ".tmp-"
# gc holds the links longest, while it removes releases.
_SWITCH_S = 60.0


class StoreError(QvlaError):
    """A robot's store is busy, is not one, or cannot do what it is told."""


class StoreBusy(StoreError):
    """Another command holds the store."""

    # What commands answer as "refused": the same again, later, may do.
    reason = "busy"


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

    def describe_robot(self) -> dict[str, Any] | None:
        """Return what this robot is and where it gets releases; None where it was not told yet.

        Raises:
            ArtifactError: the file is damaged.
        """
        if not self.robot.is_file():
            return None
        described = read_json(self.robot, "what this robot is")
        if not isinstance(described, dict):
            raise ArtifactError(
                f"{self.robot} must hold an object, got {described!r:.80}; remove it, and tell the "
                "robot again: --from, --target"
            )
        return described

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
        """Hold the store for a command that fetches, builds, checks or removes: one at a time.

        What serves can be switched meanwhile. What a killed command left is removed.

        Raises:
            StoreBusy: another command holds it.
            StoreError: it cannot be written.
        """
        with self._locked("lock", 0.0):
            for folder in (self.releases, self.trust):
                _clean(folder)
            yield

    @contextlib.contextmanager
    def switching(self) -> Iterator[None]:
        """Hold the links and the state for a moment, waiting for whoever holds them.

        Raises:
            StoreBusy: somebody holds them for long.
            StoreError: the store cannot be written.
        """
        with self._locked("switch.lock", _SWITCH_S):
            _clean(self.root)
            yield

    @contextlib.contextmanager
    def _locked(self, name: str, wait_s: float) -> Iterator[None]:
        """Hold a lock of the store, whose folders are made."""
        try:
            for folder in (self.root, self.trust, self.blobs, self.releases, self.engines):
                if not folder.is_dir():
                    folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root / name, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be written: {error.strerror}; run as the user that "
                "owns it, or give another --store"
            ) from None
        end_s = time.monotonic() + wait_s
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() >= end_s:
                        raise StoreBusy(
                            f"another command holds the store {self.root}; wait until it has ended"
                        ) from None
                time.sleep(0.05)
            yield
        finally:
            os.close(handle)


def signed_release(bundle: Path) -> Release | None:
    """Return the release that a bundle of a store is of; None where nobody signed it.

    Raises:
        RefusedRelease: the store's bundle is not the one that was signed any more.
    """
    folder = bundle.resolve().parent
    store = Store(folder.parent.parent)
    if folder.parent != store.releases or not (store.trust / "anchor.json").is_file():
        return None
    release = Release.load(folder)
    manifest = read_json(folder / BUNDLE / MANIFEST, "bundle manifest")
    digest = manifest.get("digest") if isinstance(manifest, dict) else None
    if (release.digest, release.bundle_digest) != (folder.name, digest):
        raise RefusedRelease(
            "altered",
            f"{bundle} is not what was signed as release {folder.name[:16]}; remove {folder} and "
            "install it again: qvla robot install",
        )
    return release


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clean(folder: Path) -> None:
    """Remove what has no name yet; downloads lie elsewhere, they are resumed."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        remove(leftover)

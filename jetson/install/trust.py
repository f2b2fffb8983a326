"""The noun `Catalogue`: what a repository offers, vouched for by keys that lead back to the anchor.

The rules are TUF's (theupdateframework.io, specification 1.0.33), kept by python-tuf. What it saw
last lies in the store's folder `trust`, each file written whole: it is the protection from being
shown something older.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, Root, Targets
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from jetson.install.refusals import RootKeys, refusal
from jetson.install.release import RefusedRelease
from jetson.install.release_source import NoSuchFile, ReleaseSource
from jetson.install.store import TEMPORARY, StoreError
from qvla_export.shared.artifacts import write_bytes

ANCHOR = "anchor.json"
METADATA, TARGETS = "metadata", "targets"
_HISTORY = "root_history"
_KEPT = ("timestamp.json", "snapshot.json", "targets.json")
# Some 60,000 files of releases.
_MOST_TARGETS_BYTES = 20_000_000


@dataclass(frozen=True)
class VouchedFile:
    """A file that the repository's keys vouch for."""

    # "blobs/<sha256>", "releases/<digest>.json", "deltas/<sha256>-<sha256>.zst".
    name: str
    sha256: str
    nbytes: int
    custom: Mapping[str, Any]


@dataclass(frozen=True)
class Catalogue:
    """What the repository offers."""

    # By name.
    targets: Mapping[str, VouchedFile]
    # Of the list of targets; rises with every release.
    version: int
    # When a newer list must be there, ISO 8601.
    expires: str


def anchor_trust(trust: Path, root: Path | None) -> bytes:
    """Return the root that this robot was given, keeping it the first time.

    Raises:
        StoreError: there is none yet and none is given, or another one is given.
    """
    anchor = trust / ANCHOR
    given = None if root is None else root.read_bytes()
    if anchor.is_file():
        known = anchor.read_bytes()
        if given is not None and given != known:
            raise StoreError(
                f"this robot trusts another root than {root}: newer roots come with the "
                f"repository; to trust somebody else, remove {trust} by hand"
            )
        return known
    if given is None:
        raise StoreError(
            "this robot does not know whom to trust yet: give the root of the repository's keys "
            "once (--root root.json), copied from the host by hand"
        )
    try:
        Metadata[Root].from_bytes(given)
    except RepositoryError as error:
        raise RefusedRelease("altered", f"{root} is no root of keys: {error}") from None
    write_bytes(anchor, given)
    return given


def refresh(trust: Path, anchor: bytes, source: ReleaseSource) -> Catalogue:
    """Fetch and check what a repository offers.

    Args:
        trust: the store's folder of what was seen last; what is vouched for is kept there, also
            where something after it is refused.
        anchor: the root that this robot was given.
        source: the repository.

    Raises:
        RefusedRelease: something is not what the keys vouch for, by name.
        RemoteError: the repository cannot be read.
    """
    fetcher = _Fetcher(source)
    work = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=trust))
    try:
        _copy(trust, work)
        try:
            updater = Updater(
                str(work),
                METADATA,
                fetcher=fetcher,
                config=UpdaterConfig(targets_max_length=_MOST_TARGETS_BYTES),
                bootstrap=anchor,
            )
            updater.refresh()
            return _catalogue(work)
        except (RepositoryError, DownloadError) as error:
            raise refusal(error, fetcher.name, fetcher.data, _root_keys(work)) from error
        except (AttributeError, KeyError, RecursionError, TypeError) as error:
            # What python-tuf does not foresee in a file of an attacker.
            raise RefusedRelease(
                "altered", f"{fetcher.name} is no TUF metadata: {type(error).__name__}: {error}"
            ) from error
        finally:
            _keep(work, trust)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Fetcher(FetcherInterface):
    """Hands a source's files to python-tuf, and remembers the last one for messages."""

    def __init__(self, source: ReleaseSource) -> None:
        self._source = source
        self.name = ""
        self.data = b""

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.name, self.data = unquote(url), b""
        try:
            for chunk in self._source.stream(self.name):
                if len(self.data) <= _MOST_TARGETS_BYTES:
                    self.data += chunk
                yield chunk
        except NoSuchFile as error:
            raise DownloadHTTPError(str(error), 404) from None


def _copy(trust: Path, work: Path) -> None:
    for name in _KEPT:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(trust / name, work / name)
    if (trust / _HISTORY).is_dir():
        shutil.copytree(trust / _HISTORY, work / _HISTORY)


def _keep(work: Path, trust: Path) -> None:
    """Write what was vouched for into the store: python-tuf's own files are not synced."""
    for path in (*sorted((work / _HISTORY).glob("*.root.json")), *(work / name for name in _KEPT)):
        if path.is_file():
            kept, data = trust / path.relative_to(work), path.read_bytes()
            if not kept.is_file() or kept.read_bytes() != data:
                write_bytes(kept, data)


def _catalogue(work: Path) -> Catalogue:
    signed = Metadata[Targets].from_bytes((work / "targets.json").read_bytes()).signed
    targets = {}
    for name, file in signed.targets.items():
        sha256 = file.hashes.get("sha256", "")
        custom = file.custom if isinstance(file.custom, dict) else {}
        targets[name] = VouchedFile(name, sha256, file.length, custom)
    return Catalogue(targets, signed.version, signed.expires.isoformat())


def _root_keys(work: Path) -> RootKeys:
    now: dict[str, set[str]] = {}
    ever: dict[str, set[str]] = {}
    thresholds: dict[str, int] = {}
    newest = 0
    for path in (work / _HISTORY).glob("*.root.json"):
        with contextlib.suppress(RepositoryError):
            signed = Metadata[Root].from_bytes(path.read_bytes()).signed
            roles = {name: set(role.keyids) for name, role in signed.roles.items()}
            for name, ids in roles.items():
                ever.setdefault(name, set()).update(ids)
            if signed.version > newest:
                newest, now = signed.version, roles
                thresholds = {name: role.threshold for name, role in signed.roles.items()}
    return RootKeys(now, ever, thresholds)

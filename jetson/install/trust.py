"""The noun `Catalogue`: what a repository offers, vouched for by keys that lead back to the anchor.

The rules are TUF's (theupdateframework.io, specification 1.0.33), kept by python-tuf. What it saw
last lies in the store's folder `trust`, each file written whole: it is the protection from being
shown something older.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from jetson.install.group_keys import (
    delegations_of,
    group_names,
    group_roles,
    keys_ever,
    note_keys,
)
from jetson.install.refusals import RoleKeys, refusal
from jetson.install.release import RefusedRelease
from jetson.install.release_source import NoSuchFile, ReleaseSource
from jetson.install.store import TEMPORARY, StoreError
from qvla_export.shared.artifacts import write_bytes

ANCHOR = "anchor.json"
METADATA, TARGETS = "metadata", "targets"
_HISTORY = "root_history"
# Folder of the lists that are meant for some robots only.
_GROUPS = "groups"
_KEPT = ("timestamp.json", "snapshot.json", "targets.json")
# Some 60,000 files of releases.
_MOST_TARGETS_BYTES = 20_000_000


@dataclass(frozen=True)
class VouchedFile:
    """A file that the repository's keys vouch for."""

    # "blobs/<sha256>", "releases/<digest>.json", "deltas/<sha256>-<sha256>.zst"; a group's
    # release is "releases/<group>/<digest>.json".
    name: str
    sha256: str
    nbytes: int
    custom: Mapping[str, Any]
    # Whose list names it; empty for everyone's.
    group: str = ""


@dataclass(frozen=True)
class Catalogue:
    """What the repository offers."""

    # By name.
    targets: Mapping[str, VouchedFile]
    # Of the list of targets; rises with every release.
    version: int
    # When a newer list must be there, ISO 8601.
    expires: str
    # Groups that the repository has lists for, and those whose lists were read, the closest first.
    groups: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()

    def releases(self) -> list[VouchedFile]:
        """Return the releases of all lists that were read."""
        return [one for name, one in self.targets.items() if name.startswith("releases/")]

    def for_groups(self, groups: Sequence[str]) -> "Catalogue":
        """Return what a robot of some groups, the closest first, may take."""
        targets = {name: one for name, one in self.targets.items() if one.group in ("", *groups)}
        return replace(self, targets=targets, lists=tuple(groups))


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


def refresh(
    trust: Path,
    anchor: bytes,
    source: ReleaseSource,
    groups: Sequence[str] | None = (),
) -> Catalogue:
    """Fetch and check what a repository offers.

    Args:
        trust: the store's folder of what was seen last; what is vouched for is kept there, also
            where something after it is refused.
        anchor: the root that this robot was given.
        source: the repository.
        groups: whose lists are read beside everyone's, the closest first; None for all.

    Raises:
        RefusedRelease: something is not what the keys vouch for, by name; there is no such group.
        RemoteError: the repository cannot be read.
    """
    fetcher = _Fetcher(source)
    work = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=trust))
    try:
        _copy(trust, work, groups or ())
        try:
            updater = Updater(
                str(work),
                METADATA,
                fetcher=fetcher,
                config=UpdaterConfig(targets_max_length=_MOST_TARGETS_BYTES),
                bootstrap=anchor,
            )
            updater.refresh()
            return _catalogue(work, updater, groups)
        except (RepositoryError, DownloadError) as error:
            raise refusal(error, fetcher.name, fetcher.data, _role_keys(trust, work)) from error
        except (AttributeError, KeyError, RecursionError, TypeError) as error:
            # What python-tuf does not foresee in a file of an attacker.
            raise RefusedRelease(
                "altered", f"{fetcher.name} is no TUF metadata: {type(error).__name__}: {error}"
            ) from error
        finally:
            _keep(work, trust, groups or ())
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


def _copy(trust: Path, work: Path, groups: Sequence[str]) -> None:
    for group in groups:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(trust / _GROUPS / f"{group}.json", work / f"{group}.json")
    for name in _KEPT:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(trust / name, work / name)
    if (trust / _HISTORY).is_dir():
        shutil.copytree(trust / _HISTORY, work / _HISTORY)


def _keep(work: Path, trust: Path, groups: Sequence[str]) -> None:
    """Write what was vouched for into the store: python-tuf's own files are not synced."""
    note_keys(trust, keys_ever(trust, work))
    places = {
        path: trust / path.relative_to(work) for path in (work / _HISTORY).glob("*.root.json")
    }
    places |= {work / name: trust / name for name in _KEPT}
    places |= {work / f"{group}.json": trust / _GROUPS / f"{group}.json" for group in groups}
    for path, kept in sorted(places.items()):
        if path.is_file():
            data = path.read_bytes()
            if not kept.is_file() or kept.read_bytes() != data:
                write_bytes(kept, data)


def _catalogue(work: Path, updater: Updater, groups: Sequence[str] | None) -> Catalogue:
    everyone = Metadata[Targets].from_bytes((work / "targets.json").read_bytes()).signed
    shown = Metadata[Snapshot].from_bytes((work / "snapshot.json").read_bytes()).signed.meta
    known = group_names(everyone)
    read = known if groups is None else tuple(groups)
    signed = {"": everyone}
    for group in read:
        if group not in known:
            raise RefusedRelease(
                "unknown group", f"the repository has no list for {group!r:.80}, only {known[:16]}"
            )
        # Without a list nothing was published for it yet; once there, it cannot be left out again.
        if f"{group}.json" in shown:
            updater.get_targetinfo(group_release_name(group, "list"))
            data = (work / f"{group}.json").read_bytes()
            signed[group] = Metadata[Targets].from_bytes(data).signed
    return merge_lists(signed, read)


def merge_lists(signed: Mapping[str, Targets], lists: Sequence[str]) -> Catalogue:
    """Return what several lists offer together.

    Args:
        signed: by group; everyone's by the empty name.
        lists: the groups that were asked for, the closest first.

    Raises:
        RefusedRelease: they differ about a file, or a group's names what it may not vouch for.
    """
    everyone = signed[""]
    targets: dict[str, VouchedFile] = {}
    for group, listed in signed.items():
        for name, file in listed.targets.items():
            custom = file.custom if isinstance(file.custom, dict) else {}
            vouched = VouchedFile(name, file.hashes.get("sha256", ""), file.length, custom, group)
            if group and not delegations_of(everyone).roles[group].is_delegated_path(name):
                raise RefusedRelease("unsigned", f"{group} may not vouch for {name:.120}")
            before = targets.setdefault(name, vouched)
            if (before.sha256, before.nbytes) != (vouched.sha256, vouched.nbytes):
                raise RefusedRelease("mixed", f"two lists differ about {name:.120}")
    return Catalogue(
        targets,
        everyone.version,
        everyone.expires.isoformat(),
        group_names(everyone),
        tuple(lists),
    )


def group_release_name(group: str, digest: str) -> str:
    """Return the name of a group's release among the targets."""
    return f"releases/{group}/{digest}.json"


def _role_keys(trust: Path, work: Path) -> RoleKeys:
    groups = group_roles(work)
    now = {name: set(role.keyids) for name, role in groups.items()}
    ever = keys_ever(trust, work)
    thresholds = {name: role.threshold for name, role in groups.items()}
    newest = 0
    for path in (work / _HISTORY).glob("*.root.json"):
        with contextlib.suppress(RepositoryError):
            signed = Metadata[Root].from_bytes(path.read_bytes()).signed
            roles = {name: set(role.keyids) for name, role in signed.roles.items()}
            for name, ids in roles.items():
                ever.setdefault(name, set()).update(ids)
            if signed.version > newest:
                newest = signed.version
                now |= roles
                thresholds |= {name: role.threshold for name, role in signed.roles.items()}
    return RoleKeys(now, ever, thresholds)

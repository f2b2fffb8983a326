"""The step that shows a signed release to robots, or says again what is newest."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Targets, Timestamp

from jetson.install.blobs import blob_name
from jetson.install.group_keys import group_names
from jetson.install.installation import release_name
from jetson.install.release import BUNDLE, RELEASE, Release
from qvla_export.pipeline.progress import OnProgress, Progress, ignore
from qvla_export.pipeline.release.groups import (
    Group,
    Signatory,
    delegate,
    load_groups,
    signatory_of,
)
from qvla_export.pipeline.release.keys import KeyRing, in_days
from qvla_export.pipeline.release.repository import TIMESTAMP, Repository
from qvla_export.pipeline.release.sign import read_signed
from qvla_export.shared.artifacts import sha256_file, write_bytes, write_pieces
from qvla_export.shared.errors import ArtifactError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class PublishRequest:
    """What is published, and how long it is the newest without being said again."""

    # A signed release; None to renew what is there.
    release: Path | None = None
    # Whose list it was signed in; empty for everyone's.
    group: str = ""
    # Until when robots believe that nothing newer is held back.
    days: float = 30
    # Until when a list that has to be signed again is trusted.
    targets_days: float = 365


@dataclass(frozen=True)
class Published:
    """What a repository shows."""

    # None where nothing new was published.
    release: str | None
    # Of the list of files, and of the statement what is newest.
    targets_version: int
    timestamp_version: int
    expires: str
    # What was written of files; what was there.
    written_bytes: int
    present_bytes: int


def publish(
    repository: Repository,
    keys: Path,
    request: PublishRequest | None = None,
    on_progress: OnProgress = ignore,
) -> Published:
    """Copy a release's files, then say what is newest; until the last step nobody sees it.

    Raises:
        ArtifactError: the release is not signed, or signed for another state of the repository.
        KeyRingError: snapshot's and timestamp's private keys do not lie here, or the targets' where
            the list must be signed again.
    """
    request = request or PublishRequest()
    ring = KeyRing.load(keys)
    # Before anything is written.
    ring.require_signers("snapshot")
    ring.require_signers("timestamp")
    if ring.root.is_expired():
        raise ArtifactError(
            f"the root of {keys} has expired: robots trust nothing it names; qvla keys rotate"
        )
    lists = _lists(repository, ring, request)
    name, written, present = None, 0, 0
    if request.release is not None:
        release = Release.load(request.release)
        name = release.name
        written, present = _copy_files(
            repository, request, release, lists[request.group].signed, on_progress
        )
    for group, signed in lists.items():
        path = repository.metadata / f"{signed.signed.version}.{group or 'targets'}.json"
        write_bytes(path, signed.to_bytes())
    versions = {f"{group or 'targets'}.json": m.signed.version for group, m in lists.items()}
    timestamp = _write_newest(repository, ring, versions, request.days)
    version = lists[request.group].signed.version
    return Published(
        name, version, timestamp.version, timestamp.expires.isoformat(), written, present
    )


def _lists(
    repository: Repository, ring: KeyRing, request: PublishRequest
) -> dict[str, Metadata[Targets]]:
    """Return the lists that the repository will show, by group; everyone's by the empty name."""
    known = load_groups(ring.folder)
    if request.group:
        signatory_of(ring, request.group)
    if request.release is not None and not request.group:
        everyone = _signed_list(repository, ring, request)
    else:
        everyone = _everyone(repository, ring, request, known)
    lists = {"": everyone}
    for group in group_names(everyone.signed):
        if group == request.group:
            lists[group] = _signed_list(repository, ring, request)
        elif (offers := repository.offers(group)) is not None:
            # Another machine's group is handed on as it is.
            signatory = signatory_of(ring, group) if group in known else None
            lists[group] = offers if signatory is None else _renewed(signatory, offers, request)
    return lists


def _signed_list(
    repository: Repository, ring: KeyRing, request: PublishRequest
) -> Metadata[Targets]:
    """Return the list that the release was signed in, if it follows what is there."""
    assert request.release is not None
    offers = repository.offers(request.group)
    signed = read_signed(request.release, ring, request.group)
    expected = 1 if offers is None else offers.signed.version + 1
    if offers is not None and signed.signed.to_dict() == offers.signed.to_dict():
        return signed  # this very release was published before
    if signed.signed.version != expected:
        raise ArtifactError(
            f"{request.release} was signed as list {signed.signed.version}, the repository "
            f"wants {expected} next: somebody published meanwhile; qvla release sign again"
        )
    return signed


def _everyone(
    repository: Repository, ring: KeyRing, request: PublishRequest, groups: Mapping[str, Group]
) -> Metadata[Targets]:
    """Return everyone's list, signed again where it has expired or the groups are others."""
    offers, signatory = repository.offers(), signatory_of(ring)
    if offers is None and not request.group:
        raise ArtifactError(
            f"{repository.root} has nothing to say again; publish a release: --release"
        )
    targets = Targets() if offers is None else Targets.from_dict(offers.signed.to_dict())
    delegate(targets, groups)
    if offers is None:
        return _sign_list(signatory, targets, request)
    if targets.to_dict() == offers.signed.to_dict():
        return _renewed(signatory, offers, request)
    targets.version += 1
    return _sign_list(signatory, targets, request)


def _renewed(
    signatory: Signatory, offers: Metadata[Targets], request: PublishRequest
) -> Metadata[Targets]:
    """Return a list, signed again where it has expired or its keys may not sign any more."""
    # Who plays another group's role lies elsewhere: its list is handed on.
    foreign = signatory.name != "targets" and not signatory.signers()
    if foreign or _holds(signatory, offers):
        return offers
    targets = Targets.from_dict(offers.signed.to_dict())
    targets.version += 1
    return _sign_list(signatory, targets, request)


def _sign_list(
    signatory: Signatory, targets: Targets, request: PublishRequest
) -> Metadata[Targets]:
    targets.expires = in_days(request.targets_days)
    signed = Metadata(targets)
    for signer in signatory.require_signers():
        signed.sign(signer, append=True)
    return signed


def _holds(signatory: Signatory, targets: Metadata[Targets]) -> bool:
    """Return whether a list is still signed by those who may, and has not expired."""
    try:
        signatory.delegator.verify_delegate(
            signatory.name, targets.signed_bytes, targets.signatures
        )
    except RepositoryError:
        return False
    return not targets.signed.is_expired(datetime.now(timezone.utc))


def _copy_files(
    repository: Repository,
    request: PublishRequest,
    release: Release,
    targets: Targets,
    on_progress: OnProgress,
) -> tuple[int, int]:
    assert request.release is not None
    folder = request.release
    sources = {blob_name(f.sha256): folder / BUNDLE / f.name for f in release.files}
    sources[release_name(release.digest, request.group)] = folder / RELEASE
    # Patches made for this release, by the names they were signed under.
    deltas = {path.relative_to(folder).as_posix(): path for path in folder.glob("deltas/*.zst")}
    sources |= {name: path for name, path in deltas.items() if name in targets.targets}
    written = present = 0
    for i, (name, source) in enumerate(sources.items()):
        expected = targets.targets[name].hashes["sha256"]
        path = repository.targets / name
        nbytes = source.stat().st_size
        if path.is_file() and path.stat().st_size == nbytes and sha256_file(path) == expected:
            present += nbytes
        else:
            if sha256_file(source) != expected:
                raise ArtifactError(f"{source} was changed since it was signed; create it again")
            write_pieces(path, _pieces(source))
            written += nbytes
        on_progress(Progress("files", i + 1, len(sources)))
    return written, present


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            yield piece


def _write_newest(
    repository: Repository, ring: KeyRing, versions: Mapping[str, int], days: float
) -> Timestamp:
    before, timestamp = repository.snapshot(), repository.timestamp()
    snapshot = Snapshot(1 if before is None else before.signed.version + 1, expires=in_days(days))
    snapshot.meta = {name: MetaFile(version) for name, version in versions.items()}
    newest = Timestamp(
        1 if timestamp is None else timestamp.signed.version + 1,
        expires=in_days(days),
        snapshot_meta=MetaFile(snapshot.version),
    )
    signed: list[tuple[str, str, Metadata[Any]]] = [
        (f"{snapshot.version}.snapshot.json", "snapshot", Metadata(snapshot)),
        (TIMESTAMP, "timestamp", Metadata(newest)),
    ]
    for name, role, metadata in signed:
        for signer in ring.require_signers(role):
            metadata.sign(signer, append=True)
        if name == TIMESTAMP:
            # Just before what the new keys signed is the newest.
            for root in ring.roots:
                path = repository.metadata / f"{root.signed.version}.root.json"
                if not path.is_file():
                    write_bytes(path, root.to_bytes())
        write_bytes(repository.metadata / name, metadata.to_bytes())
    return newest

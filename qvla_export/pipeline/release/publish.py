"""The step that shows a signed release to robots, or says again what is newest."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Targets, Timestamp

from jetson.install.blobs import blob_name
from jetson.install.installation import release_name
from jetson.install.release import BUNDLE, RELEASE, Release
from qvla_export.pipeline.progress import OnProgress, Progress, ignore
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
    targets = _targets(repository, ring, request)
    name, written, present = None, 0, 0
    if request.release is not None:
        release = Release.load(request.release)
        name = release.name
        written, present = _copy_files(repository, request.release, release, targets, on_progress)
    version = targets.signed.version
    write_bytes(repository.metadata / f"{version}.targets.json", targets.to_bytes())
    timestamp = _write_newest(repository, ring, version, request.days)
    return Published(
        name, version, timestamp.version, timestamp.expires.isoformat(), written, present
    )


def _targets(repository: Repository, ring: KeyRing, request: PublishRequest) -> Metadata[Targets]:
    offers = repository.offers()
    if request.release is not None:
        signed = read_signed(request.release, ring)
        expected = 1 if offers is None else offers.signed.version + 1
        if offers is not None and signed.signed.to_dict() == offers.signed.to_dict():
            return signed  # this very release was published before
        if signed.signed.version != expected:
            raise ArtifactError(
                f"{request.release} was signed as list {signed.signed.version}, the repository "
                f"wants {expected} next: somebody published meanwhile; qvla release sign again"
            )
        return signed
    if offers is None:
        raise ArtifactError(
            f"{repository.root} has nothing to say again; publish a release: --release"
        )
    if _holds(ring, offers):
        return offers
    targets = Targets.from_dict(offers.signed.to_dict())
    targets.version, targets.expires = targets.version + 1, in_days(request.targets_days)
    renewed = Metadata(targets)
    for signer in ring.require_signers("targets"):
        renewed.sign(signer, append=True)
    return renewed


def _holds(ring: KeyRing, targets: Metadata[Targets]) -> bool:
    """Return whether a list is still signed by those who may, and has not expired."""
    try:
        ring.root.verify_delegate("targets", targets.signed_bytes, targets.signatures)
    except RepositoryError:
        return False
    return not targets.signed.is_expired(datetime.now(timezone.utc))


def _copy_files(
    repository: Repository,
    folder: Path,
    release: Release,
    targets: Metadata[Targets],
    on_progress: OnProgress,
) -> tuple[int, int]:
    sources = {blob_name(f.sha256): folder / BUNDLE / f.name for f in release.files}
    sources[release_name(release.digest)] = folder / RELEASE
    # Patches made for this release, by the names they were signed under.
    deltas = {path.relative_to(folder).as_posix(): path for path in folder.glob("deltas/*.zst")}
    sources |= {name: path for name, path in deltas.items() if name in targets.signed.targets}
    written = present = 0
    for i, (name, source) in enumerate(sources.items()):
        expected = targets.signed.targets[name].hashes["sha256"]
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


def _write_newest(repository: Repository, ring: KeyRing, version: int, days: float) -> Timestamp:
    before, timestamp = repository.snapshot(), repository.timestamp()
    snapshot = Snapshot(1 if before is None else before.signed.version + 1, expires=in_days(days))
    snapshot.meta["targets.json"] = MetaFile(version)
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

"""The step in which the release engineer vouches for a release: a list of all files, signed."""

from dataclasses import dataclass
from pathlib import Path

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, TargetFile, Targets

from jetson.install.blobs import blob_name
from jetson.install.installation import release_name, require_complete
from jetson.install.release import BUNDLE, RELEASE, Release
from qvla_export.pipeline.progress import OnProgress, Progress, ignore
from qvla_export.pipeline.release.deltas import Delta, make_deltas
from qvla_export.pipeline.release.keys import KeyRing, KeyRingError, in_days
from qvla_export.pipeline.release.repository import Repository
from qvla_export.shared.artifacts import sha256_file, write_bytes
from qvla_export.shared.errors import ArtifactError

SIGNED = "targets.json"


@dataclass(frozen=True)
class SignRequest:
    """How a release is signed."""

    # Until when the list of files is trusted.
    days: float = 365
    # Newest releases of the same target that get patches to this one.
    deltas_from: int = 1


@dataclass(frozen=True)
class SignedRelease:
    """A release that waits to be published."""

    name: str
    digest: str
    # Of the list of files.
    version: int
    signatures: int
    threshold: int
    deltas: tuple[Delta, ...]


def sign(
    folder: Path,
    repository: Repository,
    keys: Path,
    request: SignRequest | None = None,
    on_progress: OnProgress = ignore,
) -> SignedRelease:
    """Add a release to the repository's list of files and sign it, with every targets key here.

    Where several must sign, each calls it with their own key. Nothing is published yet.

    Raises:
        ArtifactError: the release is not whole, or is published already.
        KeyRingError: no targets key lies here.
    """
    request = request or SignRequest()
    ring = KeyRing.load(keys)
    release = Release.load(folder)
    require_complete(release, folder / BUNDLE)
    signers = ring.signers("targets")
    if not signers:
        ring.require_signers("targets")
    offers = repository.offers()
    if offers is not None and release_name(release.digest) in offers.signed.targets:
        raise ArtifactError(f"release {release.name!r} is published already; nothing to sign")
    deltas: tuple[Delta, ...] = ()
    signed = _begun(folder, ring, release, offers)
    if signed is None:
        targets = (
            Targets(version=1) if offers is None else Targets.from_dict(offers.signed.to_dict())
        )
        targets.version += 0 if offers is None else 1
        targets.expires = in_days(request.days)
        deltas = tuple(_deltas(folder, release, repository, targets, request, on_progress))
        _add(folder, release, targets, deltas)
        signed = Metadata(targets)
    for signer in signers:
        signed.sign(signer, append=True)
    write_bytes(folder / SIGNED, signed.to_bytes())
    role = ring.root.roles["targets"]
    count = len(set(signed.signatures) & set(role.keyids))
    return SignedRelease(
        release.name, release.digest, signed.signed.version, count, role.threshold, deltas
    )


def _begun(
    folder: Path, ring: KeyRing, release: Release, offers: Metadata[Targets] | None
) -> Metadata[Targets] | None:
    """Return the list that somebody else of the targets role has signed; None to make a new one."""
    path = folder / SIGNED
    if not path.is_file():
        return None
    try:
        found = Metadata[Targets].from_bytes(path.read_bytes())
    except RepositoryError:
        return None
    expected = 1 if offers is None else offers.signed.version + 1
    if found.signed.version != expected or release_name(release.digest) not in found.signed.targets:
        return None
    known = set(found.signatures) & set(ring.root.roles["targets"].keyids)
    return found if known and ring.root.roles["targets"].threshold > 1 else None


def _deltas(
    folder: Path,
    release: Release,
    repository: Repository,
    targets: Targets,
    request: SignRequest,
    on_progress: OnProgress,
) -> list[Delta]:
    offers = sorted(
        (file.custom["serial"], name)
        for name, file in targets.targets.items()
        if name.startswith("releases/") and (file.custom or {}).get("target") == release.target
    )
    chosen = offers[::-1][: request.deltas_from]
    made: list[Delta] = []
    for i, (_, name) in enumerate(chosen):
        path = repository.targets / name
        if path.is_file():
            before = Release.from_bytes(path.read_bytes(), str(path))
            made += make_deltas(folder, release, repository, before)
        on_progress(Progress("patches", i + 1, len(chosen)))
    return made


def _add(folder: Path, release: Release, targets: Targets, deltas: tuple[Delta, ...]) -> None:
    for file in release.files:
        name = blob_name(file.sha256)
        targets.targets[name] = TargetFile(file.nbytes, {"sha256": file.sha256}, name)
    for delta in deltas:
        digest = sha256_file(folder / delta.name)
        targets.targets[delta.name] = TargetFile(delta.nbytes, {"sha256": digest}, delta.name)
    name = release_name(release.digest)
    custom = {"name": release.name, "target": release.target, "serial": targets.version}
    nbytes = (folder / RELEASE).stat().st_size
    targets.targets[name] = TargetFile(nbytes, {"sha256": release.digest}, name, {"custom": custom})


def read_signed(folder: Path, ring: KeyRing) -> Metadata[Targets]:
    """Return a release's signed list of files.

    Raises:
        ArtifactError: it is not signed, or damaged.
        KeyRingError: too few of those who must have signed.
    """
    path = folder / SIGNED
    if not path.is_file():
        raise ArtifactError(f"{folder} is not signed; first: qvla release sign")
    try:
        signed = Metadata[Targets].from_bytes(path.read_bytes())
        ring.root.verify_delegate("targets", signed.signed_bytes, signed.signatures)
    except RepositoryError as error:
        raise KeyRingError(
            f"{path} is not signed as the newest root asks: {error}; qvla release sign, by each "
            "who must"
        ) from None
    return signed

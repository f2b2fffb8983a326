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
from qvla_export.pipeline.release.groups import Signatory, delegate, load_groups, signatory_of
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
    # Whose list it goes into; empty for everyone's.
    group: str = ""


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
    """Add a release to a list of files, everyone's or a group's, and sign it with every key here.

    Where several must sign, each calls it with their own key. Nothing is published yet.

    Raises:
        ArtifactError: the release is not whole, or is published already.
        KeyRingError: none of the keys that must sign lies here, or there is no such group.
    """
    request = request or SignRequest()
    ring = KeyRing.load(keys)
    release = Release.load(folder)
    require_complete(release, folder / BUNDLE)
    signatory = signatory_of(ring, request.group)
    signers = signatory.signers() or signatory.require_signers()
    offers = repository.offers(request.group)
    name = release_name(release.digest, request.group)
    if offers is not None and name in offers.signed.targets:
        raise ArtifactError(f"release {release.name!r} is published already; nothing to sign")
    deltas: tuple[Delta, ...] = ()
    signed = _begun(folder, signatory, name, offers)
    if signed is None:
        targets = (
            Targets(version=1) if offers is None else Targets.from_dict(offers.signed.to_dict())
        )
        targets.version += 0 if offers is None else 1
        targets.expires = in_days(request.days)
        if not request.group:
            delegate(targets, load_groups(keys))
        deltas = tuple(_deltas(folder, release, repository, request, on_progress))
        _add(folder, release, targets, deltas, request.group)
        signed = Metadata(targets)
    for signer in signers:
        signed.sign(signer, append=True)
    write_bytes(signed_path(folder, request.group), signed.to_bytes())
    role = signatory.role
    count = len(set(signed.signatures) & set(role.keyids))
    return SignedRelease(
        release.name, release.digest, signed.signed.version, count, role.threshold, deltas
    )


def signed_path(folder: Path, group: str) -> Path:
    """Return where the list lies that a release was signed in, everyone's or a group's."""
    return folder / (f"list-{group}.json" if group else SIGNED)


def _begun(
    folder: Path, signatory: Signatory, name: str, offers: Metadata[Targets] | None
) -> Metadata[Targets] | None:
    """Return the list that somebody else who must sign has signed; None to make a new one."""
    group = "" if signatory.name == "targets" else signatory.name
    path = signed_path(folder, group)
    if not path.is_file():
        return None
    try:
        found = Metadata[Targets].from_bytes(path.read_bytes())
    except RepositoryError:
        return None
    expected = 1 if offers is None else offers.signed.version + 1
    if found.signed.version != expected or name not in found.signed.targets:
        return None
    known = set(found.signatures) & set(signatory.role.keyids)
    return found if known and signatory.role.threshold > 1 else None


def _deltas(
    folder: Path,
    release: Release,
    repository: Repository,
    request: SignRequest,
    on_progress: OnProgress,
) -> list[Delta]:
    # A group's first release follows one of everyone's.
    offers = _same_target(repository.offers(request.group), release) or _same_target(
        repository.offers(), release
    )
    chosen = offers[::-1][: request.deltas_from]
    made: list[Delta] = []
    for i, (_, name) in enumerate(chosen):
        path = repository.targets / name
        if path.is_file():
            before = Release.read(path)
            made += make_deltas(folder, release, repository, before)
        on_progress(Progress("patches", i + 1, len(chosen)))
    return made


def _same_target(offers: Metadata[Targets] | None, release: Release) -> list[tuple[int, str]]:
    """Return serials and names of a list's releases of a target, oldest first."""
    return sorted(
        (file.custom["serial"], name)
        for name, file in ({} if offers is None else offers.signed.targets).items()
        if name.startswith("releases/") and (file.custom or {}).get("target") == release.target
    )


def _add(
    folder: Path, release: Release, targets: Targets, deltas: tuple[Delta, ...], group: str
) -> None:
    for file in release.files:
        name = blob_name(file.sha256)
        targets.targets[name] = TargetFile(file.nbytes, {"sha256": file.sha256}, name)
    for delta in deltas:
        digest = sha256_file(folder / delta.name)
        targets.targets[delta.name] = TargetFile(delta.nbytes, {"sha256": digest}, delta.name)
    name = release_name(release.digest, group)
    custom = {"name": release.name, "target": release.target, "serial": targets.version}
    nbytes = (folder / RELEASE).stat().st_size
    targets.targets[name] = TargetFile(nbytes, {"sha256": release.digest}, name, {"custom": custom})


def read_signed(folder: Path, ring: KeyRing, group: str = "") -> Metadata[Targets]:
    """Return a release's signed list of files.

    Raises:
        ArtifactError: it is not signed, or damaged.
        KeyRingError: too few of those who must have signed.
    """
    path, signatory = signed_path(folder, group), signatory_of(ring, group)
    if not path.is_file():
        whom = f" for {group}: --group" if group else ""
        raise ArtifactError(f"{folder} is not signed{whom}; first: qvla release sign")
    try:
        signed = Metadata[Targets].from_bytes(path.read_bytes())
        signatory.delegator.verify_delegate(signatory.name, signed.signed_bytes, signed.signatures)
    except RepositoryError as error:
        raise KeyRingError(
            f"{path} is not signed as the newest root asks: {error}; qvla release sign, by each "
            "who must"
        ) from None
    return signed

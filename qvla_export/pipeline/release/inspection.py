"""Look at releases and repositories: verify one as a robot would, list it, compare two releases."""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jetson.install.blobs import blob_target, stream_checked
from jetson.install.installation import read_release
from jetson.install.release import RELEASE, RefusedRelease, Release
from jetson.install.release_source import FolderSource, ReleaseSource, open_source
from jetson.install.trust import TARGETS, Catalogue, anchor_trust, refresh
from qvla_export.pipeline.progress import OnProgress, Progress, ignore
from qvla_export.pipeline.release.deltas import changed_files
from qvla_export.pipeline.release.repository import Repository
from qvla_export.shared.errors import ArtifactError


@dataclass(frozen=True)
class VerifiedRepository:
    """A repository that was read as a robot reads it, every byte of it."""

    place: str
    targets_version: int
    expires: str
    releases: tuple[Release, ...]
    files: int
    nbytes: int


@dataclass(frozen=True)
class ReleaseDifference:
    """What a robot that has one release needs for another."""

    before: Release
    after: Release
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    # Bytes of files that the robot has already, and of those that it has not.
    present_bytes: int
    new_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla release diff` prints."""
        fields = ("name", "target", "minimum_runtime", "policy_digest", "plan_digest", "limits")
        before, after = asdict(self.before), asdict(self.after)
        values = {name: [before[name], after[name]] for name in fields}
        return {
            "before": self.before.digest,
            "after": self.after.digest,
            "fields": {name: pair for name, pair in values.items() if pair[0] != pair[1]},
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": list(self.changed),
            "present_bytes": self.present_bytes,
            "new_bytes": self.new_bytes,
        }


def verify_repository(
    place: str, root: Path, on_progress: OnProgress = ignore
) -> VerifiedRepository:
    """Read all that a repository offers, as a robot that trusts a root and has seen nothing yet.

    Raises:
        RefusedRelease: something is not what the keys vouch for; of a folder also files that
            nobody vouches for.
    """
    with tempfile.TemporaryDirectory() as trust:
        source = open_source(place)
        catalogue = refresh(Path(trust), anchor_trust(Path(trust), root), source, None)
    releases = tuple(read_release(source, vouched) for vouched in catalogue.releases())
    for release in releases:
        for file in release.files:
            blob_target(catalogue, file)
    nbytes = 0
    for i, vouched in enumerate(catalogue.targets.values()):
        nbytes += sum(len(chunk) for chunk in stream_checked(source, vouched))
        on_progress(Progress("files", i + 1, len(catalogue.targets)))
    _require_nothing_else(source, place, catalogue)
    return VerifiedRepository(
        place, catalogue.version, catalogue.expires, releases, len(catalogue.targets), nbytes
    )


def describe(place: Path) -> dict[str, Any]:
    """Return a release folder, or a repository's releases, as they say they are: not verified.

    Raises:
        ArtifactError: there is neither.
    """
    if (place / RELEASE).is_file():
        release = Release.load(place)
        return {"digest": release.digest, "bytes": release.nbytes, **asdict(release)}
    if Repository(place).offers() is None:
        raise ArtifactError(f"{place} is neither a release nor a repository; qvla release create")
    catalogue = Repository(place).catalogue()
    releases: list[dict[str, Any]] = [
        {
            "digest": one.name.rpartition("/")[2].removesuffix(".json"),
            **({"group": one.group} if one.group else {}),
            **one.custom,
        }
        for one in catalogue.releases()
    ]
    releases.sort(key=lambda release: str(release.get("serial", "")).zfill(12))
    return {
        "targets_version": catalogue.version,
        "expires": catalogue.expires,
        "groups": list(catalogue.groups),
        "releases": releases,
        "files": len(catalogue.targets),
        "deltas": sum(name.startswith("deltas/") for name in catalogue.targets),
        "bytes": sum(one.nbytes for one in catalogue.targets.values()),
    }


def diff(before: Path, after: Path) -> ReleaseDifference:
    """Compare two release folders."""
    first, second = Release.load(before), Release.load(after)
    names = {file.name for file in first.files}
    known = {file.sha256 for file in first.files}
    fresh = [file for file in second.files if file.sha256 not in known]
    return ReleaseDifference(
        first,
        second,
        tuple(file.name for file in second.files if file.name not in names),
        tuple(sorted(names - {file.name for file in second.files})),
        tuple(new.name for _, new in changed_files(first, second)),
        second.nbytes - sum(file.nbytes for file in fresh),
        sum(file.nbytes for file in fresh),
    )


def _require_nothing_else(source: ReleaseSource, place: str, catalogue: Catalogue) -> None:
    if not isinstance(source, FolderSource):
        return
    extra = sorted(set(_names(Path(place) / TARGETS)) - set(catalogue.targets))
    if extra:
        raise RefusedRelease(
            "extra file",
            f"{place} holds {extra[:8]}, which nobody vouches for and no robot reads; remove them",
        )


def _names(folder: Path) -> Iterator[str]:
    return (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

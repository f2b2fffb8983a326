"""The noun `Repository`: a folder of signed metadata and files that any static server hands out.

    metadata/   <n>.root.json, <n>.targets.json, <n>.<group>.json, <n>.snapshot.json, timestamp.json
    targets/    blobs/<sha256>, releases/<digest>.json, deltas/<sha256>-<sha256>.zst,
                releases/<group>/<digest>.json

The newest timestamp is written last: until then nobody sees what is new.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp

from jetson.install.group_keys import group_names
from jetson.install.trust import METADATA, TARGETS, Catalogue, merge_lists
from qvla_export.shared.errors import ArtifactError

TIMESTAMP = "timestamp.json"
_Signed = TypeVar("_Signed", Snapshot, Targets, Timestamp)


@dataclass(frozen=True)
class Repository:
    """A repository in a folder."""

    root: Path

    @property
    def metadata(self) -> Path:
        """Folder of what is signed."""
        return self.root / METADATA

    @property
    def targets(self) -> Path:
        """Folder of files."""
        return self.root / TARGETS

    def timestamp(self) -> Metadata[Timestamp] | None:
        """Return what is newest; None in a repository that nothing was published in.

        Raises:
            ArtifactError: it is damaged.
        """
        path = self.metadata / TIMESTAMP
        return _read(path, Timestamp) if path.is_file() else None

    def snapshot(self) -> Metadata[Snapshot] | None:
        """Return the newest snapshot, None before the first."""
        timestamp = self.timestamp()
        if timestamp is None:
            return None
        version = timestamp.signed.snapshot_meta.version
        return _read(self.metadata / f"{version}.snapshot.json", Snapshot)

    def offers(self, group: str = "") -> Metadata[Targets] | None:
        """Return the newest list of files, everyone's or a group's; None before the first."""
        snapshot = self.snapshot()
        name = group or "targets"
        if snapshot is None or f"{name}.json" not in snapshot.signed.meta:
            return None
        version = snapshot.signed.meta[f"{name}.json"].version
        return _read(self.metadata / f"{version}.{name}.json", Targets)

    def catalogue(self) -> Catalogue:
        """Return all that is offered to anybody, unverified: robots verify it.

        Raises:
            ArtifactError: nothing was published yet, or it is damaged.
        """
        everyone = self.offers()
        if everyone is None:
            raise ArtifactError(
                f"{self.root} is no repository, or an empty one; qvla release publish"
            )
        groups = group_names(everyone.signed)
        lists = {group: offers for group in groups if (offers := self.offers(group)) is not None}
        signed = {"": everyone.signed, **{group: one.signed for group, one in lists.items()}}
        return merge_lists(signed, groups)


def _read(path: Path, kind: type[_Signed]) -> Metadata[_Signed]:
    try:
        metadata = Metadata[_Signed].from_bytes(path.read_bytes())
    except (OSError, RepositoryError) as error:
        raise ArtifactError(
            f"the repository's {path} cannot be read: {error}; copy the repository again"
        ) from None
    if not isinstance(metadata.signed, kind):
        raise ArtifactError(
            f"{path} holds {metadata.signed.type} metadata; copy the repository again"
        )
    return metadata

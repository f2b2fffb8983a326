"""The noun `StoreState`: how far each release of a store is, and what must still be finished."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from jetson.install.release import Release
from jetson.install.store import Store, StoreError
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import read_json

FORMAT = "qvla-store-1"
# In this order; "failed" may follow any.
Standing = Literal["installed", "built", "checked", "probation", "proven", "failed"]
STANDINGS: tuple[Standing, ...] = get_args(Standing)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class StoredRelease:
    """A release of the store."""

    name: str
    target: str
    bundle_digest: str
    nbytes: int
    # Counts installations of this store; the newest has the highest.
    order: int
    standing: Standing = "installed"
    # Why it failed.
    reason: str | None = None
    # Machine and runtime that it was checked with; see `jetson.install.fingerprint`.
    machine: str | None = None


@dataclass(frozen=True)
class Switch:
    """A change of `current` that was begun: written before the links move, removed after."""

    old: str | None
    new: str
    # What `previous` named before.
    previous: str | None
    # Why the old one is left; None where a new release is activated.
    reason: str | None = None


@dataclass(frozen=True)
class Probation:
    """The release that has yet to prove itself."""

    digest: str
    # Of the machine's start in which it was activated.
    boot_id: str


@dataclass(frozen=True)
class StoreState:
    """All that is known about a store's releases."""

    releases: Mapping[str, StoredRelease] = field(default_factory=dict)
    switch: Switch | None = None
    probation: Probation | None = None
    # Releases that failed here and were removed -> why.
    failed: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def load(store: Store) -> "StoreState":
        """Read a store's state; an empty one where there is none yet.

        Raises:
            StoreError: the file is not one of this version.
        """
        if not store.state.exists():
            return StoreState()
        try:
            value = read_json(store.state, "the store's state")
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']!r:.40}, this version reads {FORMAT!r}")
            return _parse(value)
        except (ArtifactError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{store.state} cannot be read: {error}; remove it and install again: the store's "
                "files stay, and nothing is fetched twice"
            ) from None

    def save(self, store: Store) -> None:
        """Write the state whole."""
        write_json(store.state, {"format": FORMAT, **asdict(self)})

    def matched(self, store: Store) -> "StoreState":
        """Return the state with the releases that are in the store, no more and no less.

        A release folder has its name only once it is whole.
        """
        folders = {path.name for path in store.releases.iterdir() if path.name[0] != "."}
        releases = {digest: one for digest, one in self.releases.items() if digest in folders}
        order = max((one.order for one in releases.values()), default=0)
        for digest in sorted(folders - set(releases)):
            release = Release.load(store.release(digest))
            order += 1
            releases[digest] = StoredRelease(
                release.name, release.target, release.bundle_digest, release.nbytes, order
            )
        if releases == self.releases:
            return self
        state = replace(self, releases=releases)
        state.save(store)
        return state

    def known(self, digest: str) -> StoredRelease:
        """Return a release.

        Raises:
            StoreError: it is not installed.
        """
        try:
            return self.releases[digest]
        except KeyError:
            raise StoreError(f"release {digest[:16]} is not installed; qvla robot list") from None

    def with_release(self, digest: str, **changes: Any) -> "StoreState":
        """Return the state with fields of a release changed."""
        changed = replace(self.known(digest), **changes)
        return replace(self, releases={**self.releases, digest: changed})

    def find(self, name: str | None) -> str:
        """Return the digest of a release by its name or the start of its digest; None: the newest.

        Raises:
            StoreError: there is none, or several.
        """
        if not self.releases:
            raise StoreError("no release is installed; qvla robot install brings one")
        order = sorted(self.releases, key=lambda digest: -self.releases[digest].order)
        if name is None:
            return order[0]
        same = [digest for digest in order if self.releases[digest].name == name]
        begins = [digest for digest in order if len(name) >= 6 and digest.startswith(name)]
        if not same and len(begins) != 1:
            known = [self.releases[digest].name for digest in order]
            raise StoreError(f"no release, or several, are called {name!r:.80}; installed: {known}")
        # Releases of one name follow each other: the newest is meant.
        return (same or begins)[0]


def _parse(value: Mapping[str, Any]) -> StoreState:
    releases = {digest: StoredRelease(**one) for digest, one in value["releases"].items()}
    for one in releases.values():
        if one.standing not in STANDINGS:
            raise ValueError(f"standing {one.standing!r:.40} must be one of {STANDINGS}")
    switch, probation = value["switch"], value["probation"]
    return StoreState(
        releases,
        None if switch is None else Switch(**switch),
        None if probation is None else Probation(**probation),
        {str(digest): str(reason) for digest, reason in value["failed"].items()},
    )


def read_boot_id() -> str:
    """Return what names this start of the machine; empty where the kernel does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""

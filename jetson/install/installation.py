"""Install a release: fetched, checked and put together beside the others; nothing is switched."""

import importlib.metadata
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jetson.install.blobs import Fetched, fetch_blob, find_patch, has_blob, read_target
from jetson.install.choice import choose, require_nobodys, wrong_target
from jetson.install.release import (
    BUNDLE,
    GROUP_NAME,
    MOST_RELEASE_BYTES,
    RELEASE,
    Reason,
    RefusedRelease,
    Release,
    ReleaseFile,
    require_runtime,
)
from jetson.install.release_source import STREAM, ReleaseSource, open_source
from jetson.install.store import TEMPORARY, NoSpace, Store, StoreError, remove
from jetson.install.store_state import StoreState
from jetson.install.trust import (
    Catalogue,
    VouchedFile,
    anchor_trust,
    group_release_name,
    refresh,
)
from qvla_export.shared.artifacts import sync_folder, write_bytes, write_json
from qvla_export.shared.bundle import MANIFEST, Bundle
from qvla_export.shared.json_documents import read_json

_ROBOT_FORMAT = "qvla-robot-1"
# Beyond a release's own bytes: folders, metadata, what else the machine writes meanwhile.
_SPARE_SHARE, _SPARE_BYTES = 1.1, 1 << 20


@dataclass(frozen=True)
class InstallRequest:
    """What to install; None for what this store was told before."""

    # Folder or URL of the repository; "-": what the other end of stdin hands out, this once.
    repository: str | None = None
    # Target of this robot's bundles.
    target: str | None = None
    # The root that the keys lead back to; given once.
    root: Path | None = None
    # Name, or start of the digest, of a release; None for the newest of the target.
    release: str | None = None
    # Lists of releases that this robot reads beside everyone's, the closest first; its own, its
    # group's.
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for group in self.groups or ():
            if GROUP_NAME.fullmatch(group) is None:
                raise StoreError(f"--group must match {GROUP_NAME.pattern}, got {group!r:.80}")


@dataclass(frozen=True)
class Installed:
    """What an installation did."""

    digest: str
    name: str
    target: str
    # Bytes that came over the network; of files that were here already; of all.
    fetched_bytes: int
    present_bytes: int
    release_bytes: int
    # File names that came as patches.
    patched: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla robot install` prints."""
        return asdict(self)


def install(store: Store, request: InstallRequest) -> Installed:
    """Bring a release into the store, whole or not at all; what is there is not fetched again.

    The store must be open.

    Raises:
        RefusedRelease: it, or the repository, is not what the keys vouch for.
        NoSpace: it does not fit; nothing was written.
        RemoteError: the repository cannot be read; the same call goes on.
        StoreError: the store does not know whom to trust, what it is or where to look.
    """
    anchor = anchor_trust(store.trust, request.root)
    place, target, groups = _robot(store, request)
    source = open_source(place)
    catalogue = refresh(store.trust, anchor, source, groups)
    try:
        vouched = choose(catalogue, target, request.release)
    except RefusedRelease as error:
        if error.reason == "unknown release" and request.release is not None:
            require_nobodys(refresh(store.trust, anchor, source, None), request.release, groups)
        raise
    release = read_release(source, vouched)
    if release.target != target:
        raise wrong_target(release.name, release.target, target)
    require_runtime(release, importlib.metadata.version("qvla"))
    remember(store, _pull_from(store, place), target, groups)
    digest = release.digest
    if not store.release(digest).is_dir():
        absent = [file for file in release.files if not has_blob(store, file)]
        _require_space(store, catalogue, absent)
        fetched = [fetch_blob(store, source, catalogue, file) for file in absent]
        _assemble(store, release)
    else:
        fetched = []
    with store.switching():
        StoreState.load(store).matched(store)
    return _installed(release, fetched)


def remember(store: Store, repository: str, target: str, groups: Sequence[str] = ()) -> None:
    """Write down what a robot is and where it gets releases; an empty place has to be given yet."""
    robot = {"format": _ROBOT_FORMAT, "repository": repository, "target": target}
    write_json(store.robot, {**robot, "groups": list(groups)} if groups else robot)


def read_release(source: ReleaseSource, vouched: VouchedFile) -> Release:
    """Read a release's document from the repository.

    Raises:
        RefusedRelease: it is not what the keys vouch for.
    """
    if vouched.nbytes > MOST_RELEASE_BYTES:
        raise RefusedRelease("endless", f"{vouched.name} has {vouched.nbytes} bytes")
    release = Release.from_bytes(read_target(source, vouched), vouched.name)
    if vouched.name != release_name(release.digest, vouched.group):
        raise RefusedRelease("mixed", f"{vouched.name} holds release {release.digest[:16]}")
    return release


def release_name(digest: str, group: str = "") -> str:
    """Return a release's name among the repository's targets; of everyone's without a group."""
    return group_release_name(group, digest) if group else f"releases/{digest}.json"


def require_complete(release: Release, folder: Path) -> Bundle:
    """Return the bundle of a release that was put together.

    Raises:
        RefusedRelease: its files are not those of its manifest, or it is another bundle.
        ArtifactError: a file is damaged.
    """
    manifest = read_json(folder / MANIFEST, "bundle manifest")
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    names = {MANIFEST, *(listed if isinstance(listed, dict) else ())}
    files = {file.name for file in release.files}
    differences: dict[Reason, set[str]] = {
        "extra file": files - names,
        "missing file": names - files,
    }
    for reason, differing in differences.items():
        if differing:
            raise RefusedRelease(
                reason,
                f"release {release.name!r} and its bundle differ about {sorted(differing)[:8]}; "
                "create it again",
            )
    bundle = Bundle.load(folder)
    stated = (release.bundle_digest, release.target, release.policy_digest)
    if (bundle.digest, bundle.target, bundle.policy_digest) != stated:
        raise RefusedRelease("mixed", f"release {release.name!r} states another bundle's digests")
    return bundle


def _robot(store: Store, request: InstallRequest) -> tuple[str, str, tuple[str, ...]]:
    known = store.describe_robot() or {}
    place = request.repository or known.get("repository")
    if place and place != STREAM and not str(place).startswith(("http://", "https://")):
        place = str(Path(place).absolute())
    target = request.target or known.get("target")
    if not place or not target:
        raise StoreError(
            "this store was not told yet where releases come from and what this robot is: give "
            "--from (folder or URL) and --target (orin-jp7, orin-jp6, cpu ...) once"
        )
    if request.target and known.get("target") not in (None, request.target):
        raise StoreError(
            f"this robot is a {known['target']}, --target says {request.target}; take another "
            "--store for another robot"
        )
    groups = known.get("groups", ()) if request.groups is None else request.groups
    return str(place), str(target), tuple(map(str, groups))


def _pull_from(store: Store, place: str) -> str:
    """Return where the robot looks by itself from now on: what is streamed comes once."""
    if place != STREAM:
        return place
    known = store.describe_robot() or {}
    return str(known.get("repository", ""))


def _require_space(store: Store, catalogue: Catalogue, absent: Iterable[ReleaseFile]) -> None:
    absent = list(absent)
    # A patch lies beside the file that is made of it, one at a time.
    patches = [found[1].nbytes for f in absent if (found := find_patch(store, catalogue, f))]
    whole = sum(file.nbytes for file in absent) + max(patches, default=0)
    needed = int(whole * _SPARE_SHARE) + _SPARE_BYTES
    begun = sum(path.stat().st_size for path in store.blobs.glob(f"{TEMPORARY}*"))
    free = shutil.disk_usage(store.root).free + begun
    if free < needed:
        raise NoSpace(
            f"the release needs {needed / 1e6:.1f} MB more on the disk of {store.root}, "
            f"{free / 1e6:.1f} MB are free; make room with: qvla robot gc"
        )


def _assemble(store: Store, release: Release) -> None:
    """Link a release's files together under another name, check them, and rename."""
    digest = release.digest
    temporary = store.releases / f"{TEMPORARY}{digest}"
    remove(temporary)
    folder = temporary / BUNDLE
    folder.mkdir(parents=True)
    for file in release.files:
        (folder / file.name).hardlink_to(store.blob(file.sha256))
    write_bytes(temporary / RELEASE, release.to_bytes())
    try:
        require_complete(release, folder)
    except BaseException:
        remove(temporary)
        raise
    sync_folder(folder)
    sync_folder(temporary)
    temporary.rename(store.release(digest))
    sync_folder(store.releases)


def _installed(release: Release, fetched: list[Fetched]) -> Installed:
    came = {one.sha256: one for one in fetched}
    return Installed(
        release.digest,
        release.name,
        release.target,
        sum(one.nbytes for one in fetched),
        sum(file.nbytes for file in release.files if file.sha256 not in came),
        release.nbytes,
        tuple(f.name for f in release.files if f.sha256 in came and came[f.sha256].patched_from),
    )

"""Remove what no release needs any more: `qvla robot gc`."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jetson.install.activation import CURRENT, PREVIOUS, recover
from jetson.install.store import TEMPORARY, Store, remove
from jetson.install.store_state import StoreState
from qvla_export.shared.artifacts import sync_folder


@dataclass(frozen=True)
class Collected:
    """What was removed and what is still there."""

    # Names of releases.
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    freed_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla robot gc` prints."""
        return asdict(self)


def collect(store: Store, keep: int, boot_id: str) -> Collected:
    """Remove releases, files, engines and downloads that are not needed; the store must be open.

    `current`, `previous` and the newest installed release stay. Nothing is switched meanwhile.

    Args:
        store: the store.
        keep: proven releases to keep beside them, newest first.
        boot_id: of this start of the machine.
    """
    with store.switching():
        return _collect(store, recover(store, boot_id), keep)


def _collect(store: Store, state: StoreState, keep: int) -> Collected:
    kept = _kept(store, state, keep)
    removed = {digest: one for digest, one in state.releases.items() if digest not in kept}
    failed = {d: one.reason or "" for d, one in removed.items() if one.standing == "failed"}
    state = replace(state, failed={**state.failed, **failed})
    state.save(store)
    for folder in store.releases.iterdir():
        if folder.name not in kept:
            # Out of the way in one step; a release that is half there has no name.
            leaving = store.releases / f"{TEMPORARY}{folder.name}"
            folder.rename(leaving)
            sync_folder(store.releases)
            remove(leaving)
    # After that: a folder of its own name would be taken for a release that is new.
    state = replace(state, releases={d: one for d, one in state.releases.items() if d in kept})
    state.save(store)
    freed = 0
    for blob in store.blobs.iterdir():
        if blob.name.startswith(TEMPORARY) or blob.stat().st_nlink == 1:
            freed += blob.stat().st_size
            blob.unlink()
    bundles = {state.releases[digest].bundle_digest for digest in kept if digest in state.releases}
    for engines in store.engines.iterdir():
        if engines.name not in bundles:
            freed += sum(path.stat().st_size for path in _files(engines))
            remove(engines)
    return Collected(
        tuple(one.name for one in removed.values()),
        tuple(state.releases[digest].name for digest in sorted(kept) if digest in state.releases),
        freed,
    )


def _kept(store: Store, state: StoreState, keep: int) -> set[str]:
    newest = sorted(state.releases, key=lambda digest: -state.releases[digest].order)
    serving = {digest for link in (CURRENT, PREVIOUS) if (digest := store.linked(link))}
    proven = [d for d in newest if state.releases[d].standing == "proven" and d not in serving]
    waiting = [d for d in newest if state.releases[d].standing != "failed"][:1]
    return {*serving, *proven[:keep], *waiting}


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]

"""Say what a store holds and serves; reads only, so that it answers while another command works."""

import shutil
from dataclasses import asdict
from typing import Any

from jetson.install.activation import CURRENT, PREVIOUS
from jetson.install.fingerprint import machine_facts, machine_fingerprint, runtime_facts
from jetson.install.store import Store
from jetson.install.store_state import StoreState

_CHANGED = (
    "this machine or its runtime has changed since `current` was checked: "
    "qvla robot verify --if-changed"
)


def list_releases(store: Store) -> dict[str, Any]:
    """Return every release, newest first."""
    releases = StoreState.load(store).releases
    links = {store.linked(link): link for link in (PREVIOUS, CURRENT)}
    newest = sorted(releases, key=lambda digest: -releases[digest].order)
    return {
        "releases": [
            {"digest": digest, "link": links.get(digest), **asdict(releases[digest])}
            for digest in newest
        ]
    }


def read_status(store: Store) -> dict[str, Any]:
    """Return what serves, on probation or proven, the machine, and the room on its disk."""
    state = StoreState.load(store)
    current = store.linked(CURRENT)
    release = state.releases.get(current or "")
    fingerprint = machine_fingerprint()
    changed = release is not None and release.machine not in (None, fingerprint)
    return {
        "current": None if release is None else {"digest": current, **asdict(release)},
        "previous": store.linked(PREVIOUS),
        "probation": None if state.probation is None else asdict(state.probation),
        "unfinished": state.switch is not None,
        "machine": {"fingerprint": fingerprint, **machine_facts()},
        "runtime": runtime_facts(),
        "checked_here": release is not None and release.machine == fingerprint,
        "remedy": _CHANGED if changed else None,
        "free_bytes": shutil.disk_usage(store.root).free if store.root.exists() else None,
        "robot": store.describe_robot(),
    }

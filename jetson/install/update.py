"""Bring a robot to the newest release in one step: what a timer calls."""

from dataclasses import asdict, dataclass
from typing import Any

from jetson.install.activation import CURRENT, activate
from jetson.install.checking import check_release
from jetson.install.installation import InstallRequest, install
from jetson.install.store import Store
from jetson.install.store_state import StoreState


@dataclass(frozen=True)
class Updated:
    """What an update did."""

    digest: str
    name: str
    # Whether another release serves now, on probation.
    changed: bool
    fetched_bytes: int
    # Why the newest release was left alone; None where it was not.
    why_not: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla robot update` prints."""
        return asdict(self)


def update(store: Store, request: InstallRequest, machine: str, boot_id: str) -> Updated:
    """Install, check and activate the newest release; one that failed here is not tried again.

    The store must be open.

    Raises:
        RefusedRelease, StoreError, RemoteError: of the steps; what serves goes on.
    """
    installed = install(store, request)
    state, digest = StoreState.load(store), installed.digest
    reason = state.failed.get(digest)
    if state.known(digest).standing == "failed":
        reason = state.known(digest).reason or "it failed"
    if digest == store.linked(CURRENT) or reason is not None:
        why_not = "it serves already" if reason is None else f"it failed here: {reason}"
        return Updated(digest, installed.name, False, installed.fetched_bytes, why_not)
    check_release(store, digest, machine, boot_id)
    activate(store, digest, machine, boot_id)
    return Updated(digest, installed.name, True, installed.fetched_bytes)

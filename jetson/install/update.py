"""Bring a robot to a release in one step: what a timer calls, and `qvla push`."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from jetson.install.activation import CURRENT, activate
from jetson.install.checking import check_release
from jetson.install.installation import InstallRequest, install
from jetson.install.probation import FailedProbation
from jetson.install.release_source import STREAM, say_line
from jetson.install.store import Store
from jetson.install.store_state import StoreState

_LOOK_S = 0.5


@dataclass(frozen=True)
class Updated:
    """What an update did."""

    digest: str
    name: str
    # Whether another release serves now, on probation.
    changed: bool
    fetched_bytes: int
    # How far the release is; see `jetson.install.store_state`.
    standing: str
    # Why the release was left alone; None where it was not.
    why_not: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla robot update` prints."""
        return asdict(self)


def update(store: Store, request: InstallRequest, machine: str, boot_id: str) -> Updated:
    """Install, check and activate a release; one that failed here is not tried again.

    The store must be open. Whoever streams the release is told what is done meanwhile.

    Raises:
        RefusedRelease, StoreError, RemoteError: of the steps; what serves goes on.
    """
    _tell(request, "install")
    installed = install(store, request)
    state, digest = StoreState.load(store), installed.digest
    known = state.known(digest)
    reason = state.failed.get(digest)
    if known.standing == "failed":
        reason = known.reason or "it failed"
    if digest == store.linked(CURRENT) or reason is not None:
        why_not = "it serves already" if reason is None else f"it failed here: {reason}"
        standing = known.standing if reason is None else "failed"
        return Updated(digest, installed.name, False, installed.fetched_bytes, standing, why_not)
    _tell(request, "check")
    check_release(store, digest, machine, boot_id)
    activate(store, digest, machine, boot_id)
    _tell(request, "probation")
    return Updated(digest, installed.name, True, installed.fetched_bytes, "probation")


def await_proof(
    store: Store,
    updated: Updated,
    within_s: float | None,
    sleep: Callable[[float], object] = time.sleep,
) -> Updated:
    """Wait until whoever measures what serves has proven a release; None waits for nothing.

    Raises:
        FailedProbation: it was left meanwhile, or nobody has proven it in that time.
    """
    if within_s is None or updated.standing == "failed":
        return updated
    end_s = time.monotonic() + within_s
    while True:
        known = StoreState.load(store).releases.get(updated.digest)
        if known is not None and known.standing == "proven":
            return replace(updated, standing="proven")
        if known is None or updated.digest != store.linked(CURRENT):
            reason = "by hand" if known is None else known.reason or known.standing
            raise FailedProbation(f"release {updated.name!r} was left again: {reason}")
        if time.monotonic() >= end_s:
            raise FailedProbation(
                f"release {updated.name!r} is {known.standing} after {within_s:.0f} s and nobody "
                "has proven it: qvla-serve and qvla-probation, qvla robot supervise or prove do"
            )
        sleep(_LOOK_S)


def _tell(request: InstallRequest, stage: str) -> None:
    if request.repository == STREAM:
        say_line({"stage": stage})

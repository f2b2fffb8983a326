r"""Which release serves: activate, roll back, and finish what a power cut interrupted.

    installed -> built -> checked -> probation -> proven
                                         \-> failed, and `current` is the previous one again

The links decide what serves, and each moves in one step. A change of them is written down before
it begins and crossed out when it is done, so that whoever opens the store next can finish it.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from jetson.install.store import Store, StoreError
from jetson.install.store_state import Probation, StoreState, Switch

CURRENT, PREVIOUS = "current", "previous"
# What may be activated: its engine acted as it must, on this machine.
_READY = ("checked", "probation", "proven")


@dataclass(frozen=True)
class Switched:
    """What serves now."""

    # Digests; None where there is no release.
    current: str | None
    previous: str | None
    # Whether the links moved.
    changed: bool
    # The release that was left, and why.
    failed: str | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla robot activate` and `rollback` print."""
        return asdict(self)


def recover(store: Store, boot_id: str) -> StoreState:
    """Finish, or undo, what an earlier command had begun; the store must be open."""
    state = StoreState.load(store).matched(store)
    if state.switch is not None:
        state = _finish(store, state, state.switch, boot_id)
    if store.linked(CURRENT) is None and (previous := store.linked(PREVIOUS)) is not None:
        # Somebody removed the release that served.
        store.point(CURRENT, previous)
    return state


def activate(store: Store, wanted: str | None, machine: str, boot_id: str) -> Switched:
    """Let a release serve, on probation; the one before stays at hand.

    Args:
        store: must be open.
        wanted: name or start of the digest; None for the newest.
        machine: fingerprint of this machine now.
        boot_id: of this start of the machine.

    Raises:
        StoreError: it was not checked on this machine as it is now.
    """
    state = recover(store, boot_id)
    digest = state.find(wanted)
    release, current = state.known(digest), store.linked(CURRENT)
    if digest == current:
        return _switched(store, False)
    if release.standing not in _READY or release.machine != machine:
        why = f": {release.reason}" if release.reason else ""
        changed = release.machine not in (None, machine)
        raise StoreError(
            f"release {release.name!r} is {release.standing}{why}"
            f"{', on this machine as it was then' if changed else ''}; first: "
            f"qvla robot verify {release.name}"
        )
    # An unproven release is nothing to go back to.
    proven = current is not None and state.known(current).standing == "proven"
    older = store.linked(PREVIOUS)
    switch = Switch(current, digest, older)
    state = replace(state, switch=switch)
    state.save(store)
    if proven or older is None:
        store.point(PREVIOUS, current)
    store.point(CURRENT, digest)
    _finish(store, state, switch, boot_id)
    return _switched(store, True)


def roll_back(store: Store, reason: str, boot_id: str) -> Switched:
    """Let the previous release serve again; the store must be open.

    Raises:
        StoreError: there is none.
    """
    state = recover(store, boot_id)
    current, previous = store.linked(CURRENT), store.linked(PREVIOUS)
    if current is None or previous is None or current == previous:
        raise StoreError(
            "there is no previous release to go back to; install one: qvla robot install"
        )
    switch = Switch(current, previous, previous, reason)
    state = replace(state, switch=switch)
    state.save(store)
    _finish(store, state, switch, boot_id)
    return replace(_switched(store, True), failed=current, reason=reason)


def roll_back_unproven(store: Store, reason: str, boot_id: str) -> Switched:
    """Roll back a release on probation; leave a proven one, or the only one, where it is."""
    state = recover(store, boot_id)
    if state.probation is None or store.linked(PREVIOUS) is None:
        return _switched(store, False)
    return roll_back(store, reason, boot_id)


def roll_back_after_reboot(store: Store, boot_id: str) -> Switched:
    """Roll back a release whose probation a restart of the machine ended."""
    state = recover(store, boot_id)
    if state.probation is None or state.probation.boot_id == boot_id:
        return _switched(store, False)
    return roll_back_unproven(store, "the machine restarted during its probation", boot_id)


def prove(store: Store, boot_id: str) -> Switched:
    """End the probation of the release that serves: it is proven; the store must be open.

    Raises:
        StoreError: nothing is on probation.
    """
    state = recover(store, boot_id)
    current = store.linked(CURRENT)
    if current is None or state.probation is None or state.probation.digest != current:
        raise StoreError("no release is on probation; qvla robot activate begins one")
    replace(state.with_release(current, standing="proven"), probation=None).save(store)
    return _switched(store, False)


def _finish(store: Store, state: StoreState, switch: Switch, boot_id: str) -> StoreState:
    """Do what is left of a switch, from wherever it was interrupted."""
    if switch.reason is not None:
        return _finish_return(store, state, switch)
    if store.linked(CURRENT) != switch.new:
        # It had not come to the point: undone, whoever wants it says so again.
        store.point(PREVIOUS, switch.previous)
        state = replace(state, switch=None)
    else:
        state = replace(
            state.with_release(switch.new, standing="probation", reason=None),
            switch=None,
            probation=Probation(switch.new, boot_id),
        )
        old = state.releases.get(switch.old or "")
        if switch.old is not None and old is not None and old.standing == "probation":
            state = state.with_release(switch.old, standing="checked")
    state.save(store)
    return state


def _finish_return(store: Store, state: StoreState, switch: Switch) -> StoreState:
    store.point(CURRENT, switch.new)
    others = [
        (one.order, digest)
        for digest, one in state.releases.items()
        if one.standing == "proven" and digest not in (switch.old, switch.new)
    ]
    store.point(PREVIOUS, max(others)[1] if others else None)
    if switch.old is not None and switch.old in state.releases:
        state = state.with_release(switch.old, standing="failed", reason=switch.reason)
    state = replace(state, switch=None, probation=None)
    state.save(store)
    return state


def _switched(store: Store, changed: bool) -> Switched:
    return Switched(store.linked(CURRENT), store.linked(PREVIOUS), changed)

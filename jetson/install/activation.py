r"""Which release serves: activate, roll back, and finish what a power cut interrupted.

    installed -> built -> checked -> probation -> proven
                                         \-> failed, and `current` is the previous one again

The links decide what serves, and each moves in one step. A change of them is written down before
it begins and crossed out when it is done, so that whoever opens the store next can finish it.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from jetson.install.store import Store, StoreError
from jetson.install.store_state import Probation, StoredRelease, StoreState, Switch

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
    """Finish, or undo, what an earlier command had begun; its links must be held."""
    state = StoreState.load(store).matched(store)
    if state.switch is not None:
        state = _finish(store, state, state.switch, boot_id)
    current, previous = store.linked(CURRENT), store.linked(PREVIOUS)
    if current is None and previous is not None:
        # Somebody removed the release that served.
        store.point(CURRENT, previous)
        current = previous
    if current is not None and current == previous:
        store.point(PREVIOUS, _newest_proven(state, current))
    if state.probation is not None and state.probation.digest != current:
        state = replace(state, probation=None)
        state.save(store)
    return state


def activate(store: Store, wanted: str | None, machine: str, boot_id: str) -> Switched:
    """Let a release serve, on probation; the one before stays at hand.

    Args:
        store: the robot's.
        wanted: name or start of the digest; None for the newest.
        machine: fingerprint of this machine now.
        boot_id: of this start of the machine.

    Raises:
        StoreError: it was not checked on this machine as it is now.
    """
    with store.switching():
        state = recover(store, boot_id)
        digest = state.find(wanted)
        _require_ready(state.known(digest), machine)
        if digest == store.linked(CURRENT):
            if state.known(digest).standing == "checked":
                # It had failed a check while it served, or the state was lost.
                _begin_probation(state, digest, boot_id).save(store)
            return _switched(store, False)
        _activate(store, state, digest, boot_id)
        return _switched(store, True)


def _require_ready(release: StoredRelease, machine: str) -> None:
    if release.standing not in _READY or release.machine != machine:
        why = f": {release.reason}" if release.reason else ""
        changed = release.machine not in (None, machine)
        raise StoreError(
            f"release {release.name!r} is {release.standing}{why}"
            f"{', on this machine as it was then' if changed else ''}; first: "
            f"qvla robot verify {release.name}"
        )


def _activate(store: Store, state: StoreState, digest: str, boot_id: str) -> None:
    # An unproven release is nothing to go back to.
    current = store.linked(CURRENT)
    proven = current is not None and state.known(current).standing == "proven"
    older = store.linked(PREVIOUS)
    switch = Switch(current, digest, older)
    state = replace(state, switch=switch)
    state.save(store)
    if proven or older in (None, digest):
        store.point(PREVIOUS, current)
    store.point(CURRENT, digest)
    _finish(store, state, switch, boot_id)


def roll_back(store: Store, reason: str, boot_id: str, meant: str | None = None) -> Switched:
    """Let the previous release serve again.

    Args:
        store: the robot's.
        reason: why.
        boot_id: of this start of the machine.
        meant: digest of the release to leave; nothing is done where another one serves. None for
            whichever serves.

    Raises:
        StoreError: there is none.
    """
    with store.switching():
        return _roll_back(store, recover(store, boot_id), reason, boot_id, meant)


def _roll_back(
    store: Store, state: StoreState, reason: str, boot_id: str, meant: str | None = None
) -> Switched:
    current, previous = store.linked(CURRENT), store.linked(PREVIOUS)
    if meant not in (None, current):
        return _switched(store, False)
    if current is None or previous is None:
        raise StoreError(
            "there is no previous release to go back to; install one: qvla robot install"
        )
    switch = Switch(current, previous, previous, reason)
    state = replace(state, switch=switch)
    state.save(store)
    _finish(store, state, switch, boot_id)
    return replace(_switched(store, True), failed=current, reason=reason)


def roll_back_unproven(
    store: Store, reason: str, boot_id: str, meant: str | None = None
) -> Switched:
    """Roll back a release on probation; leave a proven one, or the only one, where it is.

    Args:
        store, reason, boot_id, meant: as `roll_back`.
    """
    with store.switching():
        return _roll_back_unproven(store, recover(store, boot_id), reason, boot_id, meant)


def _roll_back_unproven(
    store: Store, state: StoreState, reason: str, boot_id: str, meant: str | None = None
) -> Switched:
    if state.probation is None or store.linked(PREVIOUS) is None:
        return _switched(store, False)
    return _roll_back(store, state, reason, boot_id, meant)


def roll_back_after_reboot(store: Store, boot_id: str) -> Switched:
    """Roll back a release whose probation a restart of the machine ended."""
    with store.switching():
        state = recover(store, boot_id)
        if state.probation is None or state.probation.boot_id == boot_id:
            return _switched(store, False)
        why = "the machine restarted during its probation"
        return _roll_back_unproven(store, state, why, boot_id)


def prove(store: Store, boot_id: str, meant: str | None = None) -> Switched:
    """End the probation of the release that serves: it is proven.

    Args:
        store: the robot's.
        boot_id: of this start of the machine.
        meant: digest of the release that was measured; None for whichever serves.

    Raises:
        StoreError: nothing is on probation, or another release than the one that is meant.
    """
    with store.switching():
        state = recover(store, boot_id)
        if state.probation is None:
            raise StoreError("no release is on probation; qvla robot activate begins one")
        digest = state.probation.digest
        if meant not in (None, digest):
            raise StoreError(
                f"release {digest[:16]} was activated while {str(meant)[:16]} was measured; "
                "measure again"
            )
        replace(state.with_release(digest, standing="proven"), probation=None).save(store)
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
        state = replace(_begin_probation(state, switch.new, boot_id), switch=None)
        old = state.releases.get(switch.old or "")
        if switch.old is not None and old is not None and old.standing == "probation":
            state = state.with_release(switch.old, standing="checked")
    state.save(store)
    return state


def _begin_probation(state: StoreState, digest: str, boot_id: str) -> StoreState:
    state = state.with_release(digest, standing="probation", reason=None)
    return replace(state, probation=Probation(digest, boot_id))


def _newest_proven(state: StoreState, *others: str | None) -> str | None:
    """Return the newest proven release beside others; None without one."""
    proven = [
        (one.order, digest)
        for digest, one in state.releases.items()
        if one.standing == "proven" and digest not in others
    ]
    return max(proven)[1] if proven else None


def _finish_return(store: Store, state: StoreState, switch: Switch) -> StoreState:
    store.point(CURRENT, switch.new)
    store.point(PREVIOUS, _newest_proven(state, switch.old, switch.new))
    if switch.old is not None and switch.old in state.releases:
        state = state.with_release(switch.old, standing="failed", reason=switch.reason)
    state = replace(state, switch=None, probation=None)
    state.save(store)
    return state


def _switched(store: Store, changed: bool) -> Switched:
    return Switched(store.linked(CURRENT), store.linked(PREVIOUS), changed)

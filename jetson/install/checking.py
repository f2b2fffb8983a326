"""Build and check a release before anything depends on it; the result is its standing.

Both run in a process of their own: under systemd in a unit of its own, so that a build that takes
the machine's memory is ended and the policy that serves is not.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jetson.install.account import ServingAccount
from jetson.install.activation import CURRENT, activate, recover
from jetson.install.fingerprint import engines_part
from jetson.install.release import Release, require_runtime
from jetson.install.self_check import needs_engines
from jetson.install.store import TEMPORARY, Store, StoreError
from jetson.install.store_state import StoredRelease, StoreState
from qvla_export.shared.artifacts import sync_folder
from qvla_export.shared.errors import ArtifactError

_SYSTEMD = Path("/run/systemd/system")
_BUILD_TIMEOUT_S, _CHECK_TIMEOUT_S = 4 * 3600.0, 900.0
_SHOWN = 1500


class FailedCheck(StoreError):
    """A release does not act as it must on this machine; it is not activated."""


@dataclass(frozen=True)
class BuiltRelease:
    """Engines of a release on this machine."""

    digest: str
    name: str
    # None where the target's bundles run as they are.
    engines: str | None
    # Bytes by part.
    engine_bytes: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla robot build` prints."""
        return asdict(self)


@dataclass(frozen=True)
class CheckedRelease:
    """What the self-check of a release measured, and what it had to keep."""

    digest: str
    name: str
    runtime: str
    # Largest normalized |difference| from the golden actions.
    drift: float
    # The release's limits; None where it states none.
    drift_limit: float | None
    p50_ms: float | None
    p95_ms: float | None
    p95_limit_ms: float | None
    observations: int
    # What was not kept, in words.
    breaches: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla robot verify` prints."""
        return {"passed": not self.breaches, **asdict(self)}


def engine_folder(store: Store, release: StoredRelease, machine: str) -> Path:
    """Return where a release's engines lie for a machine as it is."""
    return store.engines / release.bundle_digest / engines_part(machine)


def build_release(store: Store, wanted: str | None, machine: str, boot_id: str) -> BuiltRelease:
    """Build a release's engines for this machine, unless they are there; the store must be open.

    Raises:
        StoreError: there is no such release, or they cannot be built, with what helps.
    """
    with store.switching():
        state = recover(store, boot_id)
    digest = state.find(wanted)
    release = state.known(digest)
    if not needs_engines(release.target):
        _raise_standing(store, digest, "built")
        return BuiltRelease(digest, release.name, None, {})
    folder = engine_folder(store, release, machine)
    folder.mkdir(parents=True, exist_ok=True)
    account = ServingAccount.of(store)
    if account is not None:
        account.own(folder)
    sizes = _isolated(account, ("build", store.bundle(digest), folder), _BUILD_TIMEOUT_S)
    if "error" in sizes:
        raise StoreError(f"engines of release {release.name!r}: {sizes['error']}")
    _let_serve(store, digest, release, folder)
    _raise_standing(store, digest, "built")
    return BuiltRelease(digest, release.name, str(folder), sizes)


def check_release(
    store: Store, wanted: str | None, machine: str, boot_id: str, samples: int = 100
) -> CheckedRelease:
    """Run a release on its golden observations, built before where that is needed.

    Whatever comes of it is written into the release's standing. The store must be open.

    Raises:
        FailedCheck: it is damaged, crashes, drifts or is too slow.
        StoreError: there is no such release, or its engines cannot be built.
    """
    built = build_release(store, wanted, machine, boot_id)
    state = StoreState.load(store)
    digest, name = built.digest, built.name
    try:
        checked = _check(store, state.known(digest), digest, machine, samples)
    except (ArtifactError, FailedCheck) as error:
        _fail(store, digest, str(error))
        raise FailedCheck(f"release {name!r} fails its check: {error}") from None
    if checked.breaches:
        _fail(store, digest, "; ".join(checked.breaches))
        raise FailedCheck(
            f"release {name!r} fails its check: {'; '.join(checked.breaches)}; it is not activated"
        )
    _raise_standing(store, digest, "checked", machine)
    return checked


def has_changed(store: Store, digest: str, machine: str) -> bool:
    """Return whether machine or runtime are others than those that a release was checked with."""
    return StoreState.load(store).known(digest).machine != machine


def renew_current(
    store: Store, machine: str, boot_id: str, samples: int = 100
) -> CheckedRelease | None:
    """Build and check what serves again where machine or runtime changed; None where they did not.

    The store must be open.

    Raises:
        FailedCheck, StoreError: as `check_release`.
    """
    with store.switching():
        recover(store, boot_id)
    digest = store.linked(CURRENT)
    if digest is None or not has_changed(store, digest, machine):
        return None
    checked = check_release(store, digest, machine, boot_id, samples)
    # What had failed meanwhile has to prove itself again.
    activate(store, digest, machine, boot_id)
    return checked


def _let_serve(store: Store, digest: str, release: StoredRelease, folder: Path) -> None:
    """Link engines to where a server looks for them: beside the bundle, by target."""
    link = store.release(digest) / "engines" / release.target
    link.parent.mkdir(exist_ok=True)
    temporary = link.with_name(f"{TEMPORARY}{release.target}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.absolute())
    temporary.replace(link)
    sync_folder(link.parent)


def _check(
    store: Store, stored: StoredRelease, digest: str, machine: str, samples: int
) -> CheckedRelease:
    release = Release.load(store.release(digest))
    if release.digest != digest:
        raise FailedCheck(f"release.json has digest {release.digest[:16]}, not {digest[:16]}")
    # It may be older than the one that installed the release.
    require_runtime(release, importlib.metadata.version("qvla"))
    folder = engine_folder(store, stored, machine)
    found = _isolated(
        ServingAccount.of(store), ("check", store.bundle(digest), folder, samples), _CHECK_TIMEOUT_S
    )
    if "error" in found:
        raise FailedCheck(found["error"])
    if found["bundle_digest"] != release.bundle_digest:
        raise FailedCheck(f"the bundle has digest {found['bundle_digest'][:16]}")
    limits, breaches = release.limits, list(found["breaches"])
    if limits.drift is not None and found["drift"] > limits.drift:
        breaches.append(f"drift {found['drift']:.2e}, its limit is {limits.drift:.2e}")
    if limits.p95_ms is not None and found["p95_ms"] is None:
        breaches.append("too few actions were timed for a limit of 95 in 100")
    elif limits.p95_ms is not None and found["p95_ms"] > limits.p95_ms:
        breaches.append(
            f"95 in 100 actions take {found['p95_ms']:.2f} ms, its limit is {limits.p95_ms:.2f} ms"
        )
    return CheckedRelease(
        digest,
        release.name,
        found["runtime"],
        found["drift"],
        limits.drift,
        found["p50_ms"],
        found["p95_ms"],
        limits.p95_ms,
        found["observations"],
        tuple(breaches),
    )


def unit_command(account: ServingAccount | None, systemd: Path = _SYSTEMD) -> tuple[str, ...]:
    """Return what starts a command in a unit of its own; nothing where systemd does not run."""
    program = shutil.which("systemd-run")
    if program is None or not systemd.is_dir() or os.geteuid() != 0:
        return ()
    options = ("--wait", "--pipe", "--collect", "--quiet", f"--unit=qvla-build-{os.getpid()}")
    properties = ["Nice=10", "IOSchedulingClass=idle", "MemoryMax=80%", "OOMPolicy=stop"]
    if account is not None:
        properties.append(f"User={account.name}")
    return (program, *options, *(f"--property={one}" for one in properties))


def _isolated(
    account: ServingAccount | None, arguments: Sequence[object], timeout_s: float
) -> dict[str, Any]:
    """Run `jetson.install.self_check` in a process of its own; return what it found.

    Raises:
        FailedCheck: it crashed, or takes too long.
    """
    prefix = unit_command(account) if arguments[0] == "build" else ()
    state = {} if account is None else account.environment
    kept = {name: os.environ[name] for name in ("PYTHONPATH", "HOME") if name in os.environ}
    settings = [f"--setenv={n}={value}" for n, value in {**kept, **state}.items()] if prefix else []
    words = [*prefix, *settings, sys.executable, "-m", "jetson.install.self_check"]
    try:
        done = subprocess.run(
            [*words, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, **state},
            # systemd starts it as whom it is told.
            **({} if account is None or prefix else account.process()),
        )
    except subprocess.TimeoutExpired:
        raise FailedCheck(f"{arguments[0]} has not ended after {timeout_s:.0f} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = " ".join(done.stderr.split())[-_SHOWN:]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        raise FailedCheck(f"{arguments[0]} ended with {how}: {said}")
    value: dict[str, Any] = json.loads(lines[-1])
    return value


def _raise_standing(store: Store, digest: str, standing: str, machine: str | None = None) -> None:
    """Write a standing that was reached; one that says more stays."""
    higher = {
        "built": ("checked", "probation", "proven", "failed"),
        "checked": ("probation", "proven"),
    }
    changes: dict[str, Any] = {} if machine is None else {"machine": machine, "reason": None}
    # Something may have been switched since the work began.
    with store.switching():
        state = StoreState.load(store)
        if state.known(digest).standing not in higher[standing]:
            changes["standing"] = standing
        state.with_release(digest, **changes).save(store)


def _fail(store: Store, digest: str, reason: str) -> None:
    with store.switching():
        state = StoreState.load(store)
        state.with_release(digest, standing="failed", reason=reason[:_SHOWN]).save(store)

"""Keep the release that is `current` serving: `qvla robot supervise`, as PID 1 of a container too.

A release on probation is measured by a client and then proven. Where it crashes, hangs, is too
slow or the machine restarts, the previous one serves again. A proven one is started again, and
left after several failures within a minute. A switch by another command is followed.
"""

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import httpx

from jetson.install.activation import (
    CURRENT,
    Switched,
    prove,
    roll_back,
    roll_back_after_reboot,
    roll_back_unproven,
)
from jetson.install.checking import has_changed, renew_current
from jetson.install.fingerprint import machine_fingerprint
from jetson.install.probation import ProbationTerms, measure_probation
from jetson.install.store import Store, StoreBusy, StoreError
from jetson.install.store_state import StoreState, read_boot_id
from qvla_export.shared.errors import QvlaError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SupervisionSettings:
    """How a server is started and watched."""

    # Returns the words that start a server of a bundle.
    command: Callable[[Path], Sequence[str]]
    # Where it listens.
    url: str
    terms: ProbationTerms = field(default_factory=ProbationTerms)
    token: str | None = field(default=None, repr=False)
    # How long it may take until it is ready.
    start_s: float = 300.0
    # How long it may be alive and not ready before it counts as hanging.
    hang_s: float = 5.0
    # How long it may take to stop.
    stop_s: float = 12.0
    poll_s: float = 0.25
    # A proven release that fails so often within a minute is left as well.
    failures: int = 3
    boot_id: Callable[[], str] = read_boot_id
    machine: Callable[[], str] = machine_fingerprint
    measure: Callable[..., object] = measure_probation


def serve_command(port: int, options: Sequence[str]) -> Callable[[Path], list[str]]:
    """Return what makes the words that start `qvla serve` of a bundle on a port."""
    program = [sys.executable, "-m", "qvla_export", "serve"]
    return lambda bundle: [*program, str(bundle), "--port", str(port), *options]


class SupervisionEnd(StoreError):
    """Nothing is left that could serve."""


def supervise(store: Store, settings: SupervisionSettings, stopping: Event) -> None:
    """Serve `current` until told to stop.

    Raises:
        SupervisionEnd: no release is activated, or the only one fails again and again.
    """
    failures: list[float] = []
    while not stopping.is_set():
        try:
            # What a killed command had begun is finished, and a release that is gone is left.
            _say(roll_back_after_reboot(store, settings.boot_id()))
            digest = store.linked(CURRENT)
            if digest is None:
                raise SupervisionEnd(
                    f"no release of {store.root} is current; qvla robot install, verify, activate"
                )
            why = _renew(store, digest, settings) or _serve(store, digest, settings, stopping)
        except StoreBusy as error:
            _LOG.warning("waiting: %s", error)
            stopping.wait(1.0)
            continue
        if why is None:
            continue  # stopped, or another release is current
        _LOG.error("release %s: %s", digest[:16], why)
        failures = [at for at in failures if at > time.monotonic() - 60] + [time.monotonic()]
        if _leave(store, digest, why, len(failures) >= settings.failures, settings):
            failures = []
        elif len(failures) >= settings.failures:
            raise SupervisionEnd(f"release {digest[:16]} fails and none is before it: {why}")
        else:
            stopping.wait(min(5.0, 0.2 * 2 ** len(failures)))


def _renew(store: Store, digest: str, settings: SupervisionSettings) -> str | None:
    """Build and check a release anew if machine or runtime changed; return why that failed."""
    machine = settings.machine()
    if not has_changed(store, digest, machine):
        return None
    _LOG.warning("machine or runtime changed: release %s is built and checked anew", digest[:16])
    try:
        with store.open():
            renew_current(store, machine, settings.boot_id())
    except StoreBusy:
        raise
    except StoreError as error:
        return str(error)
    return None


def _serve(store: Store, digest: str, settings: SupervisionSettings, stopping: Event) -> str | None:
    """Run a server of a release; return why it failed, None if it is to end."""
    # The release's own folder: `current` may move while it starts.
    words = [*settings.command(store.bundle(digest))]
    _LOG.info("serving release %s", digest[:16])
    server = subprocess.Popen(words)
    try:
        return _watch(server, store, digest, settings, stopping)
    finally:
        _stop(server, settings.stop_s)


def _watch(
    server: "subprocess.Popen[bytes]",
    store: Store,
    digest: str,
    settings: SupervisionSettings,
    stopping: Event,
) -> str | None:
    """Watch a server until it fails or is to end; prove it on the way."""
    ready_s = time.monotonic() + settings.start_s
    proven = not _on_probation(store, digest)
    while not stopping.is_set() and store.linked(CURRENT) == digest:
        if (failure := _failure(server, ready_s, settings)) is not None:
            return failure
        if _is_ready(settings.url):
            ready_s = time.monotonic() + settings.hang_s
            if not proven:
                try:
                    bundle_digest = StoreState.load(store).known(digest).bundle_digest
                    terms, token = settings.terms, settings.token
                    settings.measure(settings.url, terms, token, bundle_digest, stopping.wait)
                except StoreError as error:
                    return f"probation failed: {error}"
                if stopping.is_set():
                    return None
                _prove(store, digest, settings)
                proven = True
        _reap(server.pid)
        stopping.wait(settings.poll_s)
    return None


def _failure(
    server: "subprocess.Popen[bytes]", ready_s: float, settings: SupervisionSettings
) -> str | None:
    if (code := server.poll()) is not None:
        return f"the server ended with {f'signal {-code}' if code < 0 else f'status {code}'}"
    if time.monotonic() > ready_s:
        return f"the server is not ready: {settings.url}/readyz does not say so"
    return None


def _leave(
    store: Store, digest: str, why: str, proven_too: bool, settings: SupervisionSettings
) -> bool:
    """Go back to the release before, where there is one; return whether it was done."""
    boot_id = settings.boot_id()
    try:
        switched = roll_back_unproven(store, why, boot_id, digest)
        if not switched.changed and proven_too:
            switched = roll_back(store, why, boot_id, digest)
    except (QvlaError, OSError) as error:
        _LOG.error("release %s cannot be left: %s", digest[:16], error)
        return False
    _say(switched)
    # Somebody else may have switched meanwhile.
    return switched.current != digest


def _prove(store: Store, digest: str, settings: SupervisionSettings) -> None:
    try:
        prove(store, settings.boot_id(), digest)
        _LOG.info("release %s is proven", digest[:16])
    except (QvlaError, OSError) as error:
        _LOG.error("release %s is not proven: %s", digest[:16], error)


def _on_probation(store: Store, digest: str) -> bool:
    probation = StoreState.load(store).probation
    return probation is not None and probation.digest == digest


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=1.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _stop(server: "subprocess.Popen[bytes]", stop_s: float) -> None:
    server.terminate()
    try:
        server.wait(stop_s)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _reap(server: int) -> None:
    """Collect children that others left to PID 1, but not the server."""
    if os.getpid() != 1:
        return
    with contextlib.suppress(ChildProcessError):
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None and found.si_pid not in (0, server):
            os.waitpid(found.si_pid, os.WNOHANG)


def _say(switched: Switched) -> None:
    if switched.changed:
        _LOG.warning("release %s is left: %s", (switched.failed or "")[:16], switched.reason)

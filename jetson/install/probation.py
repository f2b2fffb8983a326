"""Measure a release that serves, as a client does: what proves it."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jetson.clients.http_client import RemotePolicy
from jetson.install.activation import CURRENT, Switched, prove, roll_back_unproven
from jetson.install.store import Store, StoreError
from jetson.install.store_state import StoreState, read_boot_id
from qvla_export.shared.errors import QvlaError


class FailedProbation(StoreError):
    """A release does not act as it must while it serves."""


@dataclass(frozen=True)
class ProbationTerms:
    """What a release must do before it is proven."""

    actions: int = 20
    # Over which they are spread.
    seconds: float = 10.0
    # Longest of 95 in 100 actions as a client sees them, milliseconds; None asks for nothing.
    p95_ms: float | None = None
    # How long one reply may take; a server that hangs is found out so.
    reply_s: float = 5.0


@dataclass(frozen=True)
class ProbationResult:
    """What a client saw."""

    actions: int
    seconds: float
    p50_ms: float
    p95_ms: float
    max_ms: float


@dataclass(frozen=True)
class Proof:
    """A release that is proven, and what a client saw of it; None where none measured it."""

    measured: ProbationResult | None
    switched: Switched

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla robot prove` prints."""
        measured = None if self.measured is None else asdict(self.measured)
        return {"measured": measured, **self.switched.to_json()}


def prove_current(store: Store, url: str | None, terms: ProbationTerms, token: str | None) -> Proof:
    """End the probation of `current`, measured by a client first where a URL is given.

    Args:
        store: the robot's.
        url: of the server of `current`; None believes it without.
        terms: what it must do.
        token: what the server asks for.

    Raises:
        FailedProbation, StoreError: as `measure_probation` and `activation.prove`.
    """
    measured, digest = None, None if url is None else store.linked(CURRENT)
    if url is not None and digest is not None:
        bundle_digest = StoreState.load(store).known(digest).bundle_digest
        measured = measure_probation(url, terms, token, bundle_digest)
    return Proof(measured, prove(store, read_boot_id(), digest))


def prove_or_leave(store: Store, url: str, terms: ProbationTerms, token: str | None) -> Proof:
    """Prove `current` as `prove_current`; where it fails, go back to the release before.

    A release that another command made `current` meanwhile is left alone.

    Raises:
        StoreError: as `prove_current`; the server serves another bundle.
    """
    digest = store.linked(CURRENT)
    try:
        return prove_current(store, url, terms, token)
    except FailedProbation as error:
        switched = roll_back_unproven(store, str(error), read_boot_id(), digest)
        if not switched.changed:
            raise
        return Proof(None, switched)


def measure_probation(
    url: str,
    terms: ProbationTerms,
    token: str | None = None,
    bundle_digest: str | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> ProbationResult:
    """Ask a server for actions on blank observations, spread over the time.

    Args:
        url: of the server.
        terms: how many actions, how fast.
        token: what the server asks for.
        bundle_digest: of the bundle that it must serve; None for any.
        sleep: waits so many seconds.

    Raises:
        FailedProbation: it does not answer with finite actions, or too late.
        StoreError: it serves another bundle, which says nothing about this one.
    """
    times_ms = []
    start_s = time.monotonic()
    try:
        with RemotePolicy(url, terms.reply_s, token) as remote:
            _require_bundle(remote, bundle_digest)
            observation = remote.contract.blank_observation()
            for i in range(terms.actions):
                wait_s = start_s + i * terms.seconds / terms.actions - time.monotonic()
                sleep(max(0.0, wait_s))
                sent_s = time.perf_counter()
                chunk = remote.infer(observation)
                times_ms.append((time.perf_counter() - sent_s) * 1e3)
                if not np.isfinite(chunk.actions).all():
                    raise FailedProbation(f"action {i + 1} of {terms.actions} is not finite")
    except StoreError:
        raise
    except QvlaError as error:
        raise FailedProbation(
            f"after {len(times_ms)} of {terms.actions} actions: {error}"
        ) from None
    p50_ms, p95_ms = (float(np.percentile(times_ms, percent)) for percent in (50, 95))
    if terms.p95_ms is not None and p95_ms > terms.p95_ms:
        raise FailedProbation(
            f"95 in 100 actions take a client {p95_ms:.1f} ms, the limit is {terms.p95_ms:.1f} ms"
        )
    return ProbationResult(terms.actions, time.monotonic() - start_s, p50_ms, p95_ms, max(times_ms))


def _require_bundle(remote: RemotePolicy, digest: str | None) -> None:
    serving = remote.contract.bundle_digest
    if digest not in (None, serving):
        raise StoreError(
            f"{remote.url} serves bundle {serving[:16] or 'unknown'}, the release on probation has "
            f"{str(digest)[:16]}; start the server again"
        )

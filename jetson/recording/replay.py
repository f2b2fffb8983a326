"""The noun `Replay`: what a policy does today on what was recorded, beside what was done then."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.drift import ActionDrift, action_drift
from jetson.recording.reader import Recording
from jetson.serving.policy_contract import PolicyContract, processor_of, require_no_history
from jetson.serving.service import ActionService
from qvla_export.shared.action import ActionPolicy
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.clock import whole_spans
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch

_FORMAT = "qvla.replay/1"
# Of the protocol, not of the policy.
_PROTOCOL = ("decode", "encode", "total")


@dataclass(frozen=True)
class Replay:
    """Actions of one policy on recorded observations, against the recorded actions."""

    recording: str
    # Of the bundle that acted then, and of the one that acts now; empty where there is none.
    recorded_digest: str
    digest: str
    # Whether the pictures are exactly those that were seen then.
    lossless: bool
    # Events that were not recorded; None where the recorder was killed.
    dropped: int | None
    # As `Recording.ended`: "complete", or why not all was recorded or read.
    ended: str | None
    # From the recorded actions; normalized by the policy's statistics, where it has them.
    drift: ActionDrift
    # Which of the compared observations differs most.
    worst: int
    # Time of the policy's own spans then and now.  float64 [n]
    recorded_ms: NDArray[np.float64]
    replayed_ms: NDArray[np.float64]

    @property
    def has_times(self) -> bool:
        """Whether the recording and the policy name spans by the same names."""
        return bool(self.recorded_ms.any() and self.replayed_ms.any())

    def percentile_ms(self, side: Literal["recorded", "replayed"], percent: float) -> float:
        """Return a percentile of the policy's time then or now."""
        samples_ms = self.recorded_ms if side == "recorded" else self.replayed_ms
        return float(np.percentile(samples_ms, percent))

    def save(self, path: Path) -> None:
        """Write the replay as JSON, whole or not at all."""
        write_json(
            path,
            {
                "format": _FORMAT,
                "recording": self.recording,
                "recorded_digest": self.recorded_digest,
                "digest": self.digest,
                "lossless": self.lossless,
                "dropped": self.dropped,
                "ended": self.ended,
                "drift": self.drift.to_json(),
                "worst": self.worst,
                "recorded_ms": np.round(self.recorded_ms, 6).tolist(),
                "replayed_ms": np.round(self.replayed_ms, 6).tolist(),
            },
        )


def replay_recording(
    recording: Recording,
    policy: ActionPolicy,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Ask a policy about every recorded observation that got an action.

    Args:
        recording: of `qvla serve` or `qvla run`.
        policy: of the same robot; a bundle, a checkpoint or a remote server.
        limit: observations at most; None for all.
        on_progress: called with (observations done, `limit` or 0 where all are asked about).

    Raises:
        ArtifactMismatch: the policy's chunks have another shape than the recorded ones.
        ArtifactError: nothing was recorded, or a message contradicts its schema.
        InvalidObservation: the policy needs other cameras or another state.
        PolicyFailure: the policy fails.
        RefusedSetting: its prompt repeats what it chose at the step before.
    """
    require_no_history(policy)
    service = ActionService(policy)
    shape = (service.contract.horizon, service.contract.action_dim)
    service.warm_up(1)
    then: list[NDArray[np.float32]] = []
    now: list[NDArray[np.float32]] = []
    then_ms: list[Mapping[str, float]] = []
    now_ms: list[Mapping[str, float]] = []
    for moment in recording.moments():
        if moment.chunk is None or len(then) == limit:
            continue
        if moment.chunk.actions.shape != shape:
            raise ArtifactMismatch(
                f"{recording.path} holds chunks {list(moment.chunk.actions.shape)}, the policy "
                f"makes {list(shape)}; replay it with a policy of the same robot"
            )
        chunk = service.act(moment.observation)
        then.append(moment.chunk.actions)
        now.append(chunk.actions)
        then_ms.append(moment.chunk.timing_ms)
        now_ms.append(chunk.timing_ms)
        if on_progress is not None:
            on_progress(len(then), limit or 0)
    if not then:
        raise ArtifactError(f"{recording.path} holds no observation that got an action")
    return _replay(
        recording, policy, service.contract, (np.stack(then), np.stack(now)), (then_ms, now_ms)
    )


def _replay(
    recording: Recording,
    policy: ActionPolicy,
    contract: PolicyContract,
    actions: tuple[NDArray[np.float32], NDArray[np.float32]],
    timing_ms: tuple[list[Mapping[str, float]], list[Mapping[str, float]]],
) -> Replay:
    processor = processor_of(policy)
    unit, bins = np.ones(contract.action_dim), 0
    if processor is not None:
        unit, bins = processor.statistics.action.scale(), processor.spec.action_bins
    # What both measured by the same name can be compared.
    spans = {*timing_ms[0][0]} & {*whole_spans(timing_ms[1][0])} - {*_PROTOCOL}
    recorded_ms, replayed_ms = (
        np.array([sum(timing.get(span, 0.0) for span in spans) for timing in side])
        for side in timing_ms
    )
    then, now = ((side / unit).astype(np.float32) for side in actions)
    return Replay(
        recording=str(recording.path),
        recorded_digest=recording.contract.bundle_digest,
        digest=contract.bundle_digest,
        lossless=recording.lossless,
        dropped=None if recording.counts is None else recording.counts.get("dropped"),
        ended=recording.ended,
        drift=action_drift(then, now, unit, bins),
        worst=int(np.abs(then - now).max(axis=(1, 2)).argmax()),
        recorded_ms=recorded_ms,
        replayed_ms=replayed_ms,
    )

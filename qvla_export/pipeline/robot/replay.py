"""Ask a policy about the observations of a recording."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.progress import OnProgress, bar, ignore

if TYPE_CHECKING:
    from jetson.recording.replay import Replay


def replay(
    recording: Path,
    source: PolicySource,
    limit: int | None = None,
    on_progress: OnProgress = ignore,
) -> "Replay":
    """Return a policy's actions and times against the recorded ones.

    Args:
        recording: MCAP file of `qvla serve` or `qvla run`.
        source: a policy of the same robot.
        limit: observations at most; None for all.
        on_progress: hears of every observation.

    Raises:
        QvlaError: the recording is damaged or of another robot, or the policy fails.
    """
    from jetson.recording.reader import Recording
    from jetson.recording.replay import replay_recording

    recorded = Recording(recording)
    policy: Any = source()
    try:
        return replay_recording(recorded, policy, limit, bar(on_progress, "replay"))
    finally:
        # A remote policy has a connection, a bundle's an engine.
        getattr(getattr(policy, "engine", policy), "close", lambda: None)()

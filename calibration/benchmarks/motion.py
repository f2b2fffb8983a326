"""How an arm moved in an episode: jerk, gripper flips, jumps where one chunk follows another."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Gripper commands above this close it: experts command 0 or -1 to open and 0.6 or more to close.
_CLOSING = 0.3


@dataclass(frozen=True)
class Motion:
    """Motion of one episode.

    Jerk is of the hand as it moved, the third difference of its position at the control rate, its
    length; jumps are of what was commanded.
    """

    # Root mean square and 99 % quantile over the episode, m/s^3; 0 of fewer than 4 positions.
    jerk_rms: float
    jerk_p99: float
    # Times that the gripper was told to close while opening or to open while closing.
    gripper_flips: int
    # Length of the change of the commanded step at each seam of two chunks, mm.
    seam_jumps_mm: tuple[float, ...]


@dataclass(frozen=True)
class MotionSummary:
    """Motion over the episodes of an evaluation."""

    # Mean control steps of the solved ones; None where none was solved.
    steps_to_success: float | None
    # Means over episodes, m/s^3.
    jerk_rms: float
    jerk_p99: float
    # Mean over episodes.
    gripper_flips: float
    # Root mean square and 99 % quantile over all seams, mm; 0 where there is none.
    seam_rms_mm: float
    seam_p99_mm: float

    def __str__(self) -> str:
        steps = self.steps_to_success
        return (
            f"{'no' if steps is None else f'{steps:.1f}'} steps to success, jerk RMS "
            f"{self.jerk_rms:.1f} and 99 % {self.jerk_p99:.1f} m/s^3, {self.gripper_flips:.2f} "
            f"gripper flips an episode, seam jumps RMS {self.seam_rms_mm:.2f} and 99 % "
            f"{self.seam_p99_mm:.2f} mm"
        )


def closes(commands: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which gripper commands close it.  [n] -> bool [n]"""
    return commands > _CLOSING


def measure_motion(
    positions: NDArray[np.float64],
    actions: NDArray[np.float32],
    seams: Iterable[int],
    rate_hz: float,
    unit_mm: float,
) -> Motion:
    """Measure one episode.

    Args:
        positions: of the hand, before the first action and after each, metres.  float64 [n + 1, 3]
        actions: executed ones: steps of the hand and the gripper's command.  float32 [n, 4]
        seams: numbers of the actions that begin another chunk than the first.
        rate_hz: control steps a second.
        unit_mm: length of a step of 1.
    """
    jerk = np.linalg.norm(np.diff(positions, n=3, axis=0), axis=1) * rate_hz**3
    closing = closes(actions[:, 3])
    steps_mm = actions[:, :3].astype(np.float64) * unit_mm
    return Motion(
        jerk_rms=float(np.sqrt(np.square(jerk).mean())) if len(jerk) else 0.0,
        jerk_p99=float(np.quantile(jerk, 0.99)) if len(jerk) else 0.0,
        gripper_flips=int(np.count_nonzero(closing[1:] != closing[:-1])),
        seam_jumps_mm=tuple(
            float(np.linalg.norm(steps_mm[seam] - steps_mm[seam - 1])) for seam in seams
        ),
    )


def summarize_motion(motions: Sequence[Motion], steps: Sequence[int]) -> MotionSummary:
    """Summarize episodes.

    Args:
        motions: of each episode, at least one.
        steps: control steps of the solved ones.
    """
    jumps = np.array([jump for motion in motions for jump in motion.seam_jumps_mm])
    return MotionSummary(
        steps_to_success=float(np.mean(steps)) if len(steps) else None,
        jerk_rms=float(np.mean([motion.jerk_rms for motion in motions])),
        jerk_p99=float(np.mean([motion.jerk_p99 for motion in motions])),
        gripper_flips=float(np.mean([motion.gripper_flips for motion in motions])),
        seam_rms_mm=float(np.sqrt(np.square(jumps).mean())) if len(jumps) else 0.0,
        seam_p99_mm=float(np.quantile(jumps, 0.99)) if len(jumps) else 0.0,
    )

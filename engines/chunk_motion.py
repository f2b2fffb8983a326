"""The noun `ChunkMotion`: how smooth the motion is that chunks command, before any robot moves."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.action_space import action_space
from qvla_export.shared.normalization import Bounds


@dataclass(frozen=True)
class ChunkMotion:
    """Motion within chunks, over observations that do not follow one another: there is no seam."""

    # Root mean square second difference of commands, grippers' left out, normalized: the jerk of
    # commands that are steps, the acceleration of those that are positions. None where a chunk has
    # fewer than three.
    jerk_rms: float | None
    # Mean times in a chunk that a gripper's command changes to the other half of its range.
    gripper_flips: float
    # Which numbers are grippers': the named ones, else the last.
    grippers: tuple[int, ...]

    def against(self, other: "ChunkMotion", name: str) -> str:
        """Return both figures in words, beside those of a policy of this name."""
        where = ", ".join(map(str, self.grippers))
        flips = (
            f"gripper ({where}) flips {self.gripper_flips:.3f} times, {name} "
            f"{other.gripper_flips:.3f}"
        )
        if self.jerk_rms is None or not other.jerk_rms:
            return flips
        change = self.jerk_rms / other.jerk_rms - 1.0
        return f"jerk RMS {self.jerk_rms:.2e}, {change:+.1%} of {name}'s; {flips}"


def chunk_motion(actions: NDArray[np.float32], bounds: Bounds) -> ChunkMotion:
    """Measure normalized chunks.

    Args:
        actions: float32 [observations, horizon, dim].
        bounds: of the actions.
    """
    dim = actions.shape[-1]
    grippers = action_space(dim, bounds.mask, ()).members("gripper") or [dim - 1]
    jerk = np.delete(np.diff(actions.astype(np.float64), n=2, axis=1), grippers, axis=2)
    beyond = bounds.unnormalize(actions) > 0.5 * (bounds.low + bounds.high)
    flips = np.diff(beyond[:, :, grippers].astype(np.int8), axis=1) != 0
    return ChunkMotion(
        jerk_rms=float(np.sqrt(np.square(jerk).mean())) if jerk.size else None,
        gripper_flips=float(flips.sum(axis=(1, 2)).mean()),
        grippers=tuple(grippers),
    )

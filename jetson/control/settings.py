"""The noun `LoopSettings`: rate, mode and the bounds the control loop keeps."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jetson.errors import RefusedSetting
from qvla_export.shared.motion.command_response import CommandResponse

Mode = Literal["receding", "ensemble"]


@dataclass(frozen=True)
class LoopSettings:
    """How chunks are executed and what is too late.

    Raises:
        RefusedSetting: a value is not finite or out of range.
    """

    # Commands a second: the rate at which the policy was trained.
    rate_hz: float
    # A command is sent only while the observation it comes from is younger than this.
    max_action_age_ms: float
    # The policy looks only at observations younger than this.
    max_observation_age_ms: float
    # receding: the newest chunk alone; ensemble: all chunks that speak of this slot, weighted.
    mode: Mode = "receding"
    # receding: actions of a chunk executed before the next chunk should be there.
    execute: int = 8
    # ensemble: weight of the i-th oldest chunk is exp(-decay * i) (ACT, arXiv 2304.13705). Below 0
    # the newest weighs most: -0.1 is what the evaluation of UniVLA does (its `ActionDecoder`).
    ensemble_decay: float = 0.01
    # Holding before the robot is ramped to the safe action, and how long the ramp takes.
    hold_ms: float = 500.0
    ramp_ms: float = 1000.0
    # Without a usable action for this long, the loop ends in FAULT.
    give_up_s: float = 10.0
    # Roll-forward: the policy is shown the state in which its chunk will begin, as commands move it
    # until then; None shows what was observed.
    response: CommandResponse | None = None
    # receding: largest change of each number of a command where a chunk follows another; it fades
    # over in as few commands as that takes. None for any.  float32 [dim]
    seam_limit: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        positive = {
            "rate_hz": self.rate_hz,
            "max_action_age_ms": self.max_action_age_ms,
            "max_observation_age_ms": self.max_observation_age_ms,
            "execute": self.execute,
            "give_up_s": self.give_up_s,
        }
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise RefusedSetting(f"{name} must be a number above 0, got {value}")
        if not math.isfinite(self.ensemble_decay):
            raise RefusedSetting(f"ensemble_decay must be a number, got {self.ensemble_decay}")
        for name in ("hold_ms", "ramp_ms"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise RefusedSetting(f"{name} must be 0 or more, got {value}")
        if self.mode not in ("receding", "ensemble"):
            raise RefusedSetting(f"mode must be receding or ensemble, got {self.mode!r}")
        if self.seam_limit is not None and not (self.seam_limit > 0).all():
            raise RefusedSetting(
                f"a seam's largest change must be above 0, got {self.seam_limit.tolist()}"
            )
        if self.seam_limit is not None and self.mode == "ensemble":
            raise RefusedSetting(
                "an ensemble averages over chunks and has no seams; leave out the seam limit, or "
                "use mode receding"
            )
        if self.max_observation_age_ms > self.max_action_age_ms:
            raise RefusedSetting(
                f"max_observation_age_ms ({self.max_observation_age_ms:g}) must not exceed "
                f"max_action_age_ms ({self.max_action_age_ms:g}): no action could come of it"
            )

    @property
    def period_s(self) -> float:
        """Seconds between two slots."""
        return 1.0 / self.rate_hz

    @property
    def ramp_steps(self) -> int:
        """Commands from the last one to the safe action."""
        return max(1, math.ceil(self.ramp_ms / 1000.0 * self.rate_hz - 1e-9))

"""Which observations the policy is asked about: newer than the last one, and young enough."""

import math
from dataclasses import replace

from jetson.control.sources import TimedObservation


class DroppedObservation(Exception):
    """An observation that nothing may be made of; says why."""


class ObservationGate:
    """Lets an observation through once; for every source alike, whatever its stamps say."""

    def __init__(self, max_age_ms: float) -> None:
        # How old the last admitted one was when it was: exposure, reading and decoding a frame,
        # and the wait for the slot.
        self.capture_ms = 0.0
        self._max_age_ms = max_age_ms
        # When the one that was last admitted, or dropped, was taken.
        self._looked_s = -math.inf

    def admit(self, seen: TimedObservation | None, now_s: float) -> TimedObservation | None:
        """Return what the policy may be asked about; None if there is nothing new.

        A stamp in the future is taken for now: no clock may make an old picture look fresh.

        Raises:
            DroppedObservation: it is too old, or its stamp is no time.
        """
        if seen is None:
            return None
        if not math.isfinite(seen.observed_s):
            raise DroppedObservation(f"dropped an observation stamped {seen.observed_s}")
        observed_s = min(seen.observed_s, now_s)
        if observed_s <= self._looked_s:
            return None
        self._looked_s = observed_s
        age_ms = (now_s - observed_s) * 1000.0
        if age_ms > self._max_age_ms:
            raise DroppedObservation(f"dropped an observation {age_ms:.0f} ms old")
        self.capture_ms = age_ms
        return replace(seen, observed_s=observed_s)

"""States of the control loop and what leads from one to the next.

                 first usable action
    STARTING ---------------------------> RUNNING <-----------------+
        |                                  |   ^                    |
        |             no usable action     |   |  usable action     |  usable action
        |             at a slot            v   |                    |
        |                                 HOLDING                   |
        |                                  |                        |
        |             held for hold_ms     v                        |
        |                                 RAMPING ------------------+
        |
        |  From each of RUNNING, HOLDING, RAMPING: asked to stop, or nothing usable for give_up_s
        |                                  |
        |                                  v
        |                               STOPPING   ramps to the safe action
        |                                  |
        |   nothing was ever sent          |  the safe action was sent
        +----------------------------------+
                           |
             asked to stop | gave up or the robot cannot be reached
                           v
                   STOPPED | FAULT

What is sent at each slot: STARTING nothing (the robot was never moved, so it stands); RUNNING the
policy's action, clamped; HOLDING the hold action (no motion); RAMPING and STOPPING a straight line
from the last command to the safe action, then the safe action; STOPPED and FAULT nothing more.
An engine's exception, NaN, a late, stale or malformed chunk all lead to the same place: the slot
has no usable action.
"""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType


class LoopState(Enum):
    """What the loop is doing."""

    STARTING = "starting"
    RUNNING = "running"
    HOLDING = "holding"
    RAMPING = "ramping"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAULT = "fault"

    @property
    def terminal(self) -> bool:
        """Whether nothing will be sent any more."""
        return self in (LoopState.STOPPED, LoopState.FAULT)


_ENDS = frozenset({LoopState.STOPPED, LoopState.FAULT})
# LoopState -> the states that may follow it at the next slot, itself aside. A ramp of one step ends
# at the slot that starts it, so STOPPING may be too short to be seen.
TRANSITIONS: Mapping[LoopState, frozenset[LoopState]] = MappingProxyType(
    {
        LoopState.STARTING: frozenset({LoopState.RUNNING, *_ENDS}),
        LoopState.RUNNING: frozenset({LoopState.HOLDING, LoopState.STOPPING, *_ENDS}),
        LoopState.HOLDING: frozenset(
            {LoopState.RUNNING, LoopState.RAMPING, LoopState.STOPPING, *_ENDS}
        ),
        LoopState.RAMPING: frozenset({LoopState.RUNNING, LoopState.STOPPING, *_ENDS}),
        LoopState.STOPPING: _ENDS,
        LoopState.STOPPED: frozenset(),
        LoopState.FAULT: frozenset(),
    }
)

"""The policy object on the robot: a bundle's processor around an engine."""

from dataclasses import dataclass

import numpy as np

from engines.base import Engine, EngineError
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.clock import SpanClock, inner_span
from qvla_export.shared.observation import Observation


class UnsafeAction(EngineError):
    """An engine's output must not reach the robot."""


@dataclass(frozen=True)
class EnginePolicy:
    """Acts with an engine; an `ActionPolicy`."""

    bundle: Bundle
    engine: Engine

    def infer(self, observation: Observation) -> ActionChunk:
        """Act on one observation, with the milliseconds of preprocess, engine, postprocess.

        "engine" is the whole call by the host's clock, after the device is done; its inner spans
        "engine.<name>" are the engine's own `stage_ms`. What is left between the two is checks,
        launches and copies within the host.

        Raises:
            InvalidObservation: a camera is missing or the state has another length.
            UnsafeAction: the engine put out NaN or infinity; nothing is returned to act on.
        """
        processor = self.bundle.processor
        clock = SpanClock()
        with clock.span("preprocess"):
            feeds = processor.feeds(observation)
        with clock.span("engine"):
            normalized = self.engine.infer(feeds)["actions"][0]
        stage_ms = self.engine.stage_ms
        clock.timing_ms |= {inner_span("engine", name): ms for name, ms in stage_ms.items()}
        with clock.span("postprocess"):
            if not np.isfinite(normalized).all():
                bad = np.argwhere(~np.isfinite(normalized)).tolist()
                raise UnsafeAction(
                    f"the engine put out NaN or infinity at [step, dimension] {bad[:8]}; "
                    "no action was taken. Run qvla verify on this bundle."
                )
            return processor.chunk(normalized, clock.timing_ms)

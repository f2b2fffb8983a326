"""The policy object on the robot: a bundle's processor around an engine."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from engines.base import Engine, EngineError
from engines.load import load_engine
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.clock import SpanClock, inner_span
from qvla_export.shared.observation import Observation
from qvla_export.shared.part import CHOSEN_TOKENS
from qvla_export.shared.target import Runtime, WeightForm

_NO_TOKENS = np.zeros((1, 0), np.float32)


class UnsafeAction(EngineError):
    """An engine's output must not reach the robot."""


@dataclass(frozen=True)
class EnginePolicy:
    """Acts with an engine; an `ActionPolicy`. As a context manager it closes the engine."""

    bundle: Bundle
    engine: Engine

    def infer(self, observation: Observation) -> ActionChunk:
        """Act on one observation, with the milliseconds of preprocess, engine, postprocess.

        "engine" is the whole call by the host's clock, after the device is done; its inner spans
        "engine.<name>" are the engine's own `part_ms`. What is left between the two is checks,
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
            outputs = self.engine.infer(feeds)
            normalized, chosen = outputs["actions"][0], outputs.get(CHOSEN_TOKENS, _NO_TOKENS)[0]
        part_ms = self.engine.part_ms
        clock.timing_ms |= {inner_span("engine", name): ms for name, ms in part_ms.items()}
        with clock.span("postprocess"):
            if not (np.isfinite(normalized).all() and np.isfinite(chosen).all()):
                bad = np.argwhere(~np.isfinite(normalized)).tolist()
                raise UnsafeAction(
                    f"the engine put out NaN or infinity at [step, dimension] {bad[:8]}; "
                    "no action was taken. Run qvla verify on this bundle."
                )
            told = chosen.tolist()
            return processor.chunk(normalized, clock.timing_ms, observation.state, told)

    def close(self) -> None:
        """Free what the engine holds."""
        self.engine.close()

    def __enter__(self) -> "EnginePolicy":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_bundle(
    bundle: Bundle | Path | str,
    threads: int | None = None,
    weights: WeightForm = "tuned",
    runtime: Runtime | None = None,
) -> EnginePolicy:
    """Open a bundle as a policy that acts: `with open_bundle(path) as robot: robot.infer(seen)`.

    Args:
        bundle: its folder, or what `Bundle.load` returned.
        threads: CPU threads of one operator; None for one a physical core.
        weights: "packed" computes with the stored codes; "unpacked" makes them float32 at load;
            "tuned" is what `qvla tune` chose here, packed where nothing was.
        runtime: None for the tuned or the target's own; "ort" executes the graphs of any target on
            a CPU.

    Raises:
        ArtifactError: the folder is no bundle, or a file of it was changed.
        EngineError: the runtime is not installed, refuses the graph, or has no engine yet.
    """
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(Path(bundle))
    return EnginePolicy(loaded, load_engine(loaded, threads, weights, runtime))

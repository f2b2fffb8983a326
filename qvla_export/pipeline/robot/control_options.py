"""What `qvla run` is told, unparsed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvla_export.pipeline.data_source import USUAL_COLUMNS, ColumnOptions
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WeightForm


@dataclass(frozen=True)
class RunOptions:
    """What the command line says, unparsed; its help says what each means."""

    policy: str
    source: str
    rate_hz: float
    mode: Literal["receding", "ensemble"] = "receding"
    execute: int | None = None
    ensemble_decay: float = 0.01
    roll_forward: str | None = None
    response: str = "1"
    instruction: str | None = None
    hold: str | None = None
    safe: str | None = None
    limits: str | None = None
    max_step: str | None = None
    seam_limit: str | None = None
    max_action_age_ms: float | None = None
    max_observation_age_ms: float | None = None
    hold_ms: float = 500.0
    ramp_ms: float = 1000.0
    give_up_s: float = 10.0
    commands: Literal["none", "stdout"] = "none"
    record: Path | None = None
    live: str | None = None
    seconds: float | None = None
    simulated_time: bool = False
    seed: int = 1_000_000
    columns: ColumnOptions = USUAL_COLUMNS
    joints: str = ""
    command_joints: str = ""
    threads: int | None = None
    weights: WeightForm = "tuned"

    @property
    def source_kind(self) -> str:
        """ "simulator", "episode", "camera", "stdin" or "ros2"."""
        kind, _, place = self.source.partition(":")
        placed = kind in ("simulator", "episode", "camera") and place
        if not placed and self.source not in ("stdin", "ros2"):
            raise QvlaError(
                "--source is simulator:TASK, episode:DATASET#N, camera:DEVICE, stdin or ros2, "
                f"got {self.source!r}"
            )
        return kind

    @property
    def place(self) -> str:
        """What follows the kind."""
        return self.source.partition(":")[2]

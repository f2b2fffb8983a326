"""The noun `ComparisonJob`: which contestants are compared, on what, in which seeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.comparison.contestants import Contestant
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.compare.seed_folder import SeedFolder
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Control, RolloutConfig
    from calibration.sources.base import DataSource
    from qvla_export.policies.base import Policy

_FIRST_EPISODE = 1_000_000
# Scenes of one seed do not meet those of another.
_APART = 10_000
# Of `ComparisonJob.to_json`: another value of one of these makes other rows.
_DECISIVE = ("target", "seeds", "count", "held_out", "tasks", "episodes_of_a_task_and_seed")


@dataclass(frozen=True)
class ComparisonJob:
    """What is compared on what."""

    root: Path
    source: PolicySource
    policy: "Policy"
    target: Target
    contestants: tuple[Contestant, ...]
    # Names of those that run episodes, in this order; float first.
    with_episodes: tuple[str, ...]
    seeds: tuple[int, ...]
    dataset: "DataSource | None"
    tasks: tuple[str, ...]
    # Observations to measure on and to judge by.
    count: int
    held_out: int
    # Simulated episodes of each task, contestant and seed; 0 for none.
    episodes: int
    # Environment of the libraries.
    environment: Path
    workers: int
    # Of fig. 7: observations along episodes; 0 for none.
    along_episodes: int
    # The command that asked for it, which the comparison states.
    command: str = ""

    @property
    def output(self) -> Path:
        """The comparison's JSON; its pages lie beside it."""
        return self.root / "comparison.json"

    @property
    def first_contestants(self) -> tuple[Contestant, ...]:
        """Those that run episodes, in their order; none where no episodes are run."""
        if not self.episodes:
            return ()
        return tuple(c for name in self.with_episodes for c in self.contestants if c.name == name)

    @property
    def other_contestants(self) -> tuple[Contestant, ...]:
        """Those of which only the action error is measured; those with episodes come first."""
        named = [c for name in self.with_episodes for c in self.contestants if c.name == name]
        ordered = [*named, *(c for c in self.contestants if c not in named)]
        return tuple(c for c in ordered if c not in self.first_contestants)

    def run_of(self, seed: int) -> RunFolder:
        """Return a seed's run folder."""
        return RunFolder(self.root / f"seed-{seed}")

    def seed_folder(self, seed: int) -> SeedFolder:
        """Return a seed's folder, calibrated.

        Raises:
            QvlaError: the data set or the simulator cannot give so many observations.
        """
        run = self.run_of(seed)
        request = CalibrationRequest(self.dataset, self.tasks, self.count, self.held_out, seed)
        calibrate(run, request)
        return SeedFolder(run, seed, self.source, self.policy, self.target, self.environment)

    def config(self, seed: int, control: "Control" = "none") -> "RolloutConfig":
        """Return a seed's episodes, the same of all contestants."""
        from calibration.benchmarks.evaluation import RolloutConfig

        first = _FIRST_EPISODE + _APART * seed
        return RolloutConfig(self.tasks, self.episodes, seed=first, control=control)

    def to_json(self) -> dict[str, Any]:
        """Return what a comparison records of it."""
        return {
            "target": self.target.name,
            "seeds": list(self.seeds),
            "count": self.count,
            "held_out": self.held_out,
            "tasks": list(self.tasks),
            "episodes_of_a_task_and_seed": self.episodes,
            "with_episodes": list(self.with_episodes),
        }

    def has_rows_of(self, settings: Mapping[str, Any]) -> bool:
        """Whether a comparison with these recorded settings has rows that this one would make."""
        ours = self.to_json()
        return all(settings.get(name) == ours[name] for name in _DECISIVE)

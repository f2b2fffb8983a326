"""What `qvla compare` does: every contestant in every seed, written after each."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvla_export.allocation.setting import parse_setting
from qvla_export.comparison.comparison import FLOAT, Comparison
from qvla_export.comparison.contestants import Contestant, parse_contestant
from qvla_export.comparison.rows import Outcome, Row, SeedRow
from qvla_export.pipeline import evaluate as judging
from qvla_export.pipeline import plan as stages
from qvla_export.pipeline.compare import contestant as contest
from qvla_export.pipeline.compare.seed_folder import (
    Stand,
    cumulative_ranks,
    sensitivities,
    stand_of,
)
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.quantizer.layer_names import module_of
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Control, RolloutConfig
    from calibration.sources.lerobot import LeRobotDataset
    from qvla_export.policies.base import Policy

_LOG = logging.getLogger(__name__)
_FIRST_EPISODE = 1_000_000
# Scenes of one seed do not meet those of another.
_APART = 10_000


@dataclass(frozen=True)
class Contest:
    """What is compared on what."""

    root: Path
    source: PolicySource
    policy: "Policy"
    target: Target
    contestants: tuple[Contestant, ...]
    # Names of those that run episodes, in this order; float first.
    with_episodes: tuple[str, ...]
    seeds: tuple[int, ...]
    dataset: "LeRobotDataset | None"
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

    @property
    def output(self) -> Path:
        """The comparison's JSON."""
        return self.root / "comparison.json"

    def stand(self, seed: int) -> Stand:
        """Return a seed's run folder, calibrated."""
        run = RunFolder(self.root / f"seed-{seed}")
        stages.calibrate(run, self.dataset, self.tasks, self.count, self.held_out, seed)
        return Stand(run, seed, self.source, self.policy, self.target, self.environment)

    def config(self, seed: int, control: "Control" = "none") -> "RolloutConfig":
        """Return a seed's episodes, the same of all contestants."""
        from calibration.benchmarks.evaluation import RolloutConfig

        first = _FIRST_EPISODE + _APART * seed
        return RolloutConfig(self.tasks, self.episodes, seed=first, control=control)

    def told(self) -> dict[str, Any]:
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


def compare_all(wanted: Contest, comparison: Comparison, say: Callable[[str], None]) -> Comparison:
    """Measure every contestant, those that run episodes first, and write after each.

    A contestant that cannot be made is left out with a warning, so that the others are not lost.

    Raises:
        QvlaError: a seed's calibration or its float policy fails.
    """
    stands = [wanted.stand(seed) for seed in wanted.seeds]
    first = [c for name in wanted.with_episodes for c in wanted.contestants if c.name == name]
    rest = [c for c in wanted.contestants if c not in first]
    if not wanted.episodes:
        first, rest = [], [*first, *rest]
    comparison = _with_sensitivities(stands[0], comparison)
    for contestant in first:
        say(f"{contestant.name}: bundle, action error")
        comparison = _added(wanted, comparison, contestant, stands, exported=True)
    for contestant in first:
        if comparison.row(contestant.name) is not None:
            say(f"{contestant.name}: episodes")
            comparison = _played(wanted, comparison, contestant, stands)
            if contestant.name == FLOAT:
                say("controls")
                comparison = _controlled(wanted, comparison, stands)
    for contestant in rest:
        say(f"{contestant.name}: action error")
        exported = contestant.name == FLOAT
        comparison = _added(wanted, comparison, contestant, stands, exported)
    if wanted.along_episodes:
        say("sensitivities along episodes")
        ranks = cumulative_ranks(stands[0], wanted.dataset, wanted.tasks, wanted.along_episodes)
        comparison = _saved(wanted, replace(comparison, ranks=ranks))
    return comparison


def _added(
    wanted: Contest,
    comparison: Comparison,
    contestant: Contestant,
    stands: Sequence[Stand],
    exported: bool,
) -> Comparison:
    rows = []
    for stand in stands:
        try:
            rows.append(contest.measure(stand_of(stand, contestant), contestant, exported))
        except QvlaError as error:
            if contestant.name == FLOAT:
                raise
            _LOG.warning("%s, seed %d is left out: %s", contestant.name, stand.seed, error)
    if not rows:
        return comparison
    # Episodes of an earlier run of the same thing stay until they are run again.
    before = comparison.row(contestant.name)
    kept = {} if before is None else {(row.seed, row.digest): row for row in before.seeds}
    row = Row(contestant.name, tuple(_keeping(row, kept) for row in rows))
    return _saved(wanted, comparison.with_row(row))


def _keeping(row: SeedRow, kept: Mapping[tuple[int, str], SeedRow]) -> SeedRow:
    before = kept.get((row.seed, row.digest))
    if before is None:
        return row
    return replace(row, episodes=before.episodes, cumulative=before.cumulative)


def _played(
    wanted: Contest, comparison: Comparison, contestant: Contestant, stands: Sequence[Stand]
) -> Comparison:
    found = comparison.row(contestant.name)
    assert found is not None
    by_seed = {stand.seed: stand for stand in stands}
    for row in found.seeds:
        stand = stand_of(by_seed[row.seed], contestant)
        config = wanted.config(row.seed)
        played = contest.with_episodes(stand, contestant, row, config, wanted.workers)
        rows = tuple(played if old.seed == row.seed else old for old in found.seeds)
        found = Row(contestant.name, rows)
        comparison = _saved(wanted, comparison.with_row(found))
    return comparison


def _controlled(wanted: Contest, comparison: Comparison, stands: Sequence[Stand]) -> Comparison:
    from calibration.benchmarks.evaluation import CONTROLS

    controls: dict[str, tuple[Outcome, ...]] = {}
    for control in CONTROLS[1:]:
        played: list[Outcome] = []
        for stand in stands:
            config = wanted.config(stand.seed, control)
            setting = parse_setting(FLOAT)
            done = judging.rollouts(stand.run, setting, config, wanted.source, wanted.workers)
            played += contest.outcomes(done)
        controls[control] = tuple(played)
    return _saved(wanted, replace(comparison, controls=controls))


def _with_sensitivities(stand: Stand, comparison: Comparison) -> Comparison:
    """Add what Fig. 1 shows."""
    sensitivities(stand)
    measured = Sensitivities.load(stand.run.sensitivities)
    sums: dict[str, dict[str, float]] = {}
    for layer, values in measured.values.items():
        module = sums.setdefault(module_of(layer), {str(bits): 0.0 for bits in measured.widths})
        for bits, of_channels in zip(measured.widths, values, strict=True):
            module[str(bits)] += float(of_channels.sum())
    percentiles = {
        str(bits): tuple(np.percentile(np.concatenate([v[i] for v in found]), range(101)).tolist())
        for found in (list(measured.values.values()),)
        for i, bits in enumerate(measured.widths)
    }
    return replace(comparison, modules=sums, channels=percentiles)


def _saved(wanted: Contest, comparison: Comparison) -> Comparison:
    comparison.save(wanted.output)
    return comparison


def contestants_named(names: Sequence[str]) -> tuple[Contestant, ...]:
    """Read names, float first and each once."""
    return tuple(parse_contestant(name) for name in dict.fromkeys([FLOAT, *names]))

"""The step that compares every contestant in every seed, and writes after each."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qvla_export.allocation.setting import parse_setting
from qvla_export.comparison.comparison import FLOAT, Comparison
from qvla_export.comparison.contestants import Contestant, parse_contestant
from qvla_export.comparison.rows import Outcome, Row, SeedRow
from qvla_export.pipeline import evaluate
from qvla_export.pipeline.compare.contestant import (
    measure_contestant,
    outcomes,
    with_episodes,
)
from qvla_export.pipeline.compare.job import ComparisonJob
from qvla_export.pipeline.compare.seed_folder import (
    cumulative_ranks,
    folder_for,
    measure_sensitivities,
)
from qvla_export.pipeline.progress import NumberedSteps, OnProgress, ignore
from qvla_export.pipeline.run_folder import load_if_current, require_artifact
from qvla_export.quantizer.layer_names import module_of
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.artifacts import write_bytes
from qvla_export.shared.errors import QvlaError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparisonPages:
    """A comparison, and the files that show it."""

    comparison: Comparison
    json: Path
    html: Path
    markdown: Path


def compare_contestants(job: ComparisonJob, on_progress: OnProgress = ignore) -> ComparisonPages:
    """Measure every contestant in every seed, continuing an interrupted run, and write the pages.

    A contestant that cannot be made is left out with a warning, so that the others are not lost.

    Raises:
        QvlaError: a seed's calibration or its float policy fails.
    """
    empty = _empty_comparison(job)
    comparison = replace(
        _load_same(job, empty),
        command=empty.command,
        settings=empty.settings,
        made_with=empty.made_with,
    )
    return _write_pages(job, _Run(job, on_progress).measure_all(comparison))


def write_pages(job: ComparisonJob) -> ComparisonPages:
    """Write the pages of what an earlier run has measured; measures nothing.

    Raises:
        ArtifactError: the first seed has no sensitivities.
    """
    return _write_pages(job, _load_same(job, _empty_comparison(job)))


def contestants_named(names: Sequence[str]) -> tuple[Contestant, ...]:
    """Read names of contestants, float first and each once.

    Raises:
        QvlaError: a name is of no known form.
    """
    return tuple(parse_contestant(name) for name in dict.fromkeys([FLOAT, *names]))


class _Run:
    """A comparison in the making: its seeds' folders, and the step it is at."""

    def __init__(self, job: ComparisonJob, on_progress: OnProgress) -> None:
        self._job = job
        self._folders = [job.seed_folder(seed) for seed in job.seeds]
        steps = 1 + 2 * len(job.first_contestants) + len(job.other_contestants)
        steps += any(c.name == FLOAT for c in job.first_contestants) + bool(job.along_episodes)
        self._steps = NumberedSteps(on_progress, steps)

    def measure_all(self, comparison: Comparison) -> Comparison:
        """Measure what episodes are run of first, then the others, then Fig. 7."""
        job, steps = self._job, self._steps
        with steps.next("sensitivities of every channel and width") as tell:
            comparison = self._with_sensitivities(comparison, tell)
        for contestant in job.first_contestants:
            with steps.next(f"{contestant.name}: bundle, action error") as tell:
                comparison = self._with_contestant(comparison, contestant, True, tell)
        for contestant in job.first_contestants:
            with steps.next(f"{contestant.name}: episodes") as tell:
                comparison = self._with_episodes(comparison, contestant, tell)
            if contestant.name == FLOAT:
                with steps.next("controls") as tell:
                    comparison = self._with_controls(comparison, tell)
        for contestant in job.other_contestants:
            with steps.next(f"{contestant.name}: action error") as tell:
                exported = contestant.name == FLOAT
                comparison = self._with_contestant(comparison, contestant, exported, tell)
        if job.along_episodes:
            with steps.next("sensitivities along episodes") as tell:
                count = job.along_episodes
                ranks = cumulative_ranks(self._folders[0], job.dataset, job.tasks, count, tell)
                comparison = self._save(replace(comparison, ranks=ranks))
        return comparison

    def _save(self, comparison: Comparison) -> Comparison:
        comparison.save(self._job.output)
        return comparison

    def _with_sensitivities(self, comparison: Comparison, tell: OnProgress) -> Comparison:
        """Add what Fig. 1 shows."""
        measured = measure_sensitivities(self._folders[0], tell)
        sums: dict[str, dict[str, float]] = {}
        for layer, values in measured.values.items():
            module = sums.setdefault(module_of(layer), {str(bits): 0.0 for bits in measured.widths})
            for bits, of_channels in zip(measured.widths, values, strict=True):
                module[str(bits)] += float(of_channels.sum())
        layers = list(measured.values.values())
        percentiles = {
            str(bits): tuple(
                np.percentile(np.concatenate([v[i] for v in layers]), range(101)).tolist()
            )
            for i, bits in enumerate(measured.widths)
        }
        return replace(comparison, modules=sums, channels=percentiles)

    def _with_contestant(
        self, comparison: Comparison, contestant: Contestant, exported: bool, tell: OnProgress
    ) -> Comparison:
        rows = []
        for folder in self._folders:
            try:
                inside = folder_for(folder, contestant, tell)
                rows.append(measure_contestant(inside, contestant, exported, tell))
            except QvlaError as error:
                if contestant.name == FLOAT:
                    raise
                _LOG.warning("%s, seed %d is left out: %s", contestant.name, folder.seed, error)
        if not rows:
            return comparison
        # Episodes of an earlier run of the same thing stay until they are run again.
        before = comparison.row(contestant.name)
        known = {} if before is None else {(row.seed, row.digest): row for row in before.seeds}
        row = Row(contestant.name, tuple(_with_known_episodes(row, known) for row in rows))
        return self._save(comparison.with_row(row))

    def _with_episodes(
        self, comparison: Comparison, contestant: Contestant, tell: OnProgress
    ) -> Comparison:
        row = comparison.row(contestant.name)
        if row is None:
            return comparison  # left out: it could not be made
        folders = {folder.seed: folder for folder in self._folders}
        for of_seed in row.seeds:
            inside = folder_for(folders[of_seed.seed], contestant, tell)
            config, workers = self._job.config(of_seed.seed), self._job.workers
            judged = with_episodes(inside, contestant, of_seed, config, workers, tell)
            seeds = tuple(judged if old.seed == of_seed.seed else old for old in row.seeds)
            row = Row(contestant.name, seeds)
            comparison = self._save(comparison.with_row(row))
        return comparison

    def _with_controls(self, comparison: Comparison, tell: OnProgress) -> Comparison:
        from calibration.benchmarks.evaluation import CONTROLS

        job, setting = self._job, parse_setting(FLOAT)
        controls: dict[str, tuple[Outcome, ...]] = {}
        for control in CONTROLS[1:]:
            episodes: list[Outcome] = []
            for folder in self._folders:
                config = job.config(folder.seed, control)
                evaluation = evaluate.rollouts(
                    folder.run, setting, config, job.source, job.workers, tell
                )
                episodes += outcomes(evaluation)
            controls[control] = tuple(episodes)
        return self._save(replace(comparison, controls=controls))


def _with_known_episodes(row: SeedRow, known: Mapping[tuple[int, str], SeedRow]) -> SeedRow:
    before = known.get((row.seed, row.digest))
    if before is None:
        return row
    return replace(row, episodes=before.episodes, cumulative=before.cumulative)


def _empty_comparison(job: ComparisonJob) -> Comparison:
    from jetson.board import read_board_state

    board = read_board_state()
    machine: dict[str, Any] = {"cpu_model": str(board.cpu_model), "cores": str(board.cores)}
    return Comparison(job.policy.digest, job.command, machine, job.to_json())


def _load_same(job: ComparisonJob, empty: Comparison) -> Comparison:
    """Return what an earlier run has measured of the same, or the comparison without rows."""
    earlier = load_if_current(
        job.output,
        Comparison.load,
        lambda old: old.policy_digest == empty.policy_digest and job.has_rows_of(old.settings),
    )
    return earlier or empty


def _write_pages(job: ComparisonJob, comparison: Comparison) -> ComparisonPages:
    from qvla_export.comparison.markdown import to_markdown
    from qvla_export.comparison.page import render

    first = job.run_of(job.seeds[0])
    measured = Sensitivities.load(require_artifact(first.sensitivities, "compare"))
    page, text = job.output.with_suffix(".html"), job.output.with_suffix(".md")
    write_bytes(page, render(comparison, measured).encode("utf-8", "replace"))
    write_bytes(text, to_markdown(comparison).encode("utf-8", "replace"))
    return ComparisonPages(comparison, job.output, page, text)

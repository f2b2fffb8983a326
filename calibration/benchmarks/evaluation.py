"""The nouns of closed-loop judgement: which episodes are run, how each went, what they say."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from calibration.benchmarks.chains import ChainScore, chain_lengths, score_chains
from calibration.benchmarks.libero.libero_tasks import libero_task
from calibration.benchmarks.metaworld.shifts import NO_SHIFT, parse_shift, shift_fits, shift_of
from calibration.benchmarks.metaworld.tasks import find_task, scene_siblings
from calibration.benchmarks.motion import Motion, MotionSummary, summarize_motion
from calibration.benchmarks.phases import PHASES
from calibration.benchmarks.simulators import find_benchmark_task, require_meta_world
from qvla_export.shared.action import Gripper
from qvla_export.shared.artifacts import read_json, require_fields, write_json
from qvla_export.shared.errors import ArtifactError, QvlaError

Control = Literal["none", "blank-image", "wrong-instruction"]
CONTROLS: tuple[Control, ...] = ("none", "blank-image", "wrong-instruction")


@dataclass(frozen=True)
class RolloutConfig:
    """Which episodes are run and how chunks are executed.

    Raises:
        QvlaError: a value is out of range, or a task is unknown or named twice.
    """

    tasks: tuple[str, ...]
    episodes: int
    # First episode seed; the same seed gives the same scene to every policy.
    seed: int = 1_000_000
    # Actions of a chunk executed before the policy looks again; a shorter chunk is executed whole.
    execute: int = 8
    # What is taken from the policy to see whether it needs it.
    control: Control = "none"
    # Control steps that pass between a look and its chunk; 0 stops time while the policy thinks.
    delay_steps: int = 0
    # Whether as many steps pass as the policy really thinks.
    live: bool = False
    # Whether the policy is shown the state at which its chunk will begin, see `roll_forward`.
    roll_forward: bool = False
    # Largest change of the hand's commanded step where a chunk begins, mm; 0 for any.
    seam_limit_mm: float = 0.0
    # What is changed of the scenes, "NAME:GRADE", see `Shift`; mixed has all that apply in turn.
    shift: str = NO_SHIFT
    # What the policy means by its gripper's number, where the simulator has a convention; None
    # elsewhere.
    gripper: Gripper | None = None

    def __post_init__(self) -> None:
        least = min(self.episodes - 1, self.execute - 1, self.seed, self.delay_steps)
        if least < 0 or not self.tasks or not 0 <= self.seam_limit_mm < math.inf:
            raise QvlaError(
                "a rollout needs tasks, episodes >= 1, execute >= 1, seed >= 0, "
                f"delay_steps >= 0 and seam_limit_mm >= 0, got {self}"
            )
        if self.live and self.delay_steps:
            raise QvlaError(
                "a live rollout takes the delay from the policy; leave out live or delay_steps"
            )
        parse_control(self.control)
        if len({*self.tasks}) != len(self.tasks):
            raise QvlaError(f"each task counts once, got {', '.join(self.tasks)}")
        for name in self.tasks:
            find_benchmark_task(name)
        parse_shift(self.shift)
        self._check_simulators()

    def _check_simulators(self) -> None:
        """Refuse what the tasks' simulators do not do."""
        only = {
            f"the shift {self.shift}": self.shift != NO_SHIFT,
            f"the control {self.control}": self.control == "wrong-instruction",
            self.timing: self.live or self.delay_steps or self.roll_forward or self.seam_limit_mm,
        }
        for what, asked in only.items():
            if asked:
                require_meta_world(self.tasks, what)
        libero = [name for name in self.tasks if libero_task(name)]
        if libero and self.gripper is None:
            raise QvlaError(
                f"{libero[0]} opens at -1 and closes at +1: say what the policy means, --gripper "
                "robosuite for 0 closed and 1 open (OpenVLA's data sets, OFT, UniVLA) or as-is for "
                "-1 and +1 (LIBERO's own demonstrations)"
            )
        if self.gripper is not None and not libero:
            raise QvlaError("--gripper is for LIBERO's tasks; leave it out")

    @property
    def timing(self) -> str:
        """Return how time passes while the policy thinks, in words."""
        words = ["live" if self.live else f"a delay of {self.delay_steps} steps"]
        words += ["roll-forward"] if self.roll_forward else []
        words += [f"seams within {self.seam_limit_mm:g} mm"] if self.seam_limit_mm else []
        return ", ".join(words)

    def runnable(self) -> "RolloutConfig":
        """Return the configuration with only the tasks its control and shift can be tried on.

        Raises:
            QvlaError: there are none.
        """
        if self.shift == NO_SHIFT and self.control != "wrong-instruction":
            return self
        kept = tuple(name for name in self.tasks if shift_fits(self.shift, find_task(name)))
        if not kept:
            raise QvlaError(
                f"the shift {self.shift} cannot be seen in {', '.join(self.tasks)}: what is shown "
                "as object state has no camera, light or colours"
            )
        if self.control != "wrong-instruction":
            return replace(self, tasks=kept)
        tasks = tuple(name for name in kept if scene_siblings(find_task(name)))
        if not tasks:
            raise QvlaError(
                "the wrong-instruction control needs tasks that share a scene with another, "
                f"got {', '.join(self.tasks)}"
            )
        return replace(self, tasks=tasks)


@dataclass(frozen=True)
class EpisodeResult:
    """One episode."""

    task: str
    seed: int
    success: bool
    # Control steps until success or the limit.
    steps: int
    # ||A - A*||^2 of each decision, normalized units; empty without a reference policy.
    deviations: tuple[float, ...]
    # How the arm moved; None in evaluations of earlier versions.
    motion: Motion | None = None
    # What each decision took, milliseconds; empty unless the rollout was live.
    infer_ms: tuple[float, ...] = ()
    # In which phase of the task each of the deviations was; empty in evaluations of before.
    phases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """All episodes of one policy."""

    # What was evaluated, in words, and the digest of its checkpoint or bundle.
    policy: str
    digest: str
    config: RolloutConfig
    results: tuple[EpisodeResult, ...]
    versions: dict[str, str]

    def success(self, task: str | None = None) -> float:
        """Return the share of solved episodes, of one task or of all.

        Raises:
            QvlaError: no episode of that task was run.
        """
        chosen = [r.success for r in self.results if task in (None, r.task)]
        if not chosen:
            raise QvlaError(f"no episode of {task} was run, only {', '.join(self.config.tasks)}")
        return sum(chosen) / len(chosen)

    def solved_per_hour(self) -> float:
        """Return the tasks solved in an hour of motion, failed attempts included."""
        hours = sum(row.steps / find_benchmark_task(row.task).control_hz for row in self.results)
        return 3600.0 * sum(row.success for row in self.results) / hours

    def infer_ms(self) -> tuple[float, float] | None:
        """Return the median and 99 % quantile of a live rollout's decisions."""
        taken = [ms for row in self.results for ms in row.infer_ms]
        if not taken:
            return None
        return float(np.median(taken)), float(np.quantile(taken, 0.99))

    def success_by_shift(self) -> dict[str, float]:
        """Return the share of solved episodes of each shift; empty without any."""
        solved: dict[str, list[bool]] = {}
        for row in self.results if self.config.shift != NO_SHIFT else ():
            shift = shift_of(self.config.shift, find_task(row.task), row.seed)
            if shift is not None:
                solved.setdefault(str(shift), []).append(row.success)
        return {name: sum(rows) / len(rows) for name, rows in sorted(solved.items())}

    def chain_lengths(self) -> list[int]:
        """Return how many tasks each seed's chain of five solves in a row; none of fewer tasks."""
        solved = {(row.task, row.seed): row.success for row in self.results}
        return chain_lengths(solved, self.config.tasks, sorted({row.seed for row in self.results}))

    def chains(self) -> ChainScore | None:
        """Return the score of chains of five tasks; None where there are fewer tasks."""
        lengths = self.chain_lengths()
        return score_chains(lengths) if lengths else None

    def interval(self) -> tuple[float, float]:
        """Return the Wilson 95 % interval of the overall success."""
        return wilson_interval(sum(r.success for r in self.results), len(self.results))

    def motion(self) -> MotionSummary | None:
        """Return how the arm moved; None where an episode has no record of it."""
        motions = [r.motion for r in self.results if r.motion is not None]
        if len(motions) < len(self.results):
            return None
        return summarize_motion(motions, [r.steps for r in self.results if r.success])

    def error_by_phase(self) -> dict[str, float]:
        """Return the mean ||A - A*||^2 of the decisions of each phase, in a task's order.

        Empty without a reference policy, and of evaluations of before.
        """
        found: dict[str, list[float]] = {}
        for row in self.results:
            if len(row.phases) < len(row.deviations):
                return {}
            for phase, deviation in zip(row.phases, row.deviations, strict=True):
                found.setdefault(phase, []).append(deviation)
        return {phase: float(np.mean(found[phase])) for phase in PHASES if phase in found}

    def cumulative_deviation(self) -> list[float]:
        """Return the mean over episodes of the running sum of deviations, by decision (eq. 5).

        An episode that ended earlier keeps its last sum.
        """
        longest = max((len(r.deviations) for r in self.results), default=0)
        sums = np.zeros((len(self.results), longest))
        for row, result in zip(sums, self.results, strict=True):
            row[: len(result.deviations)] = result.deviations
        return [float(v) for v in np.cumsum(sums, axis=1).mean(axis=0)] if longest else []

    def save(self, path: Path) -> None:
        """Write JSON atomically, with the summary a reader looks for first."""
        low, high = self.interval()
        motion, chains = self.motion(), self.chains()
        summary = {
            "success": self.success(),
            "wilson_95": [low, high],
            "episodes": len(self.results),
            "by_task": {task: self.success(task) for task in self.config.tasks},
            "solved_per_hour": self.solved_per_hour(),
            "infer_ms": self.infer_ms(),
            "by_shift": self.success_by_shift(),
            "chains": None if chains is None else asdict(chains),
            "cumulative_deviation": self.cumulative_deviation(),
            "error_by_phase": self.error_by_phase(),
            "motion": None if motion is None else asdict(motion),
        }
        write_json(path, {"summary": summary, **asdict(self)})


def parse_control(text: str) -> Control:
    """Return the control of a name.

    Raises:
        QvlaError: there is none of it.
    """
    for control in CONTROLS:
        if text == control:
            return control
    raise QvlaError(f"control must be one of {CONTROLS}, got {text!r}")


def load_evaluation(path: Path) -> Evaluation:
    """Read an evaluation.

    Raises:
        ArtifactError: the file is missing, damaged or of another version.
    """
    raw = read_json(path, "evaluation")
    try:
        require_fields(raw, ("policy", "digest", "config", "results", "versions"), str(path))
        config = RolloutConfig(**{**raw["config"], "tasks": tuple(raw["config"]["tasks"])})
        results = tuple(result_from_json(row) for row in raw["results"])
        return Evaluation(raw["policy"], raw["digest"], config, results, raw["versions"])
    except ArtifactError:
        raise
    except (TypeError, KeyError, QvlaError) as error:
        raise ArtifactError(f"{path} is no evaluation ({error}); run qvla evaluate anew") from error


def result_from_json(row: dict[str, Any]) -> EpisodeResult:
    """Read one episode as `dataclasses.asdict` wrote it."""
    row = dict(row)  # what is none fails here, as the callers expect
    motion = row.get("motion")
    if motion is not None:
        motion = Motion(**{**motion, "seam_jumps_mm": tuple(motion["seam_jumps_mm"])})
    tuples = {name: tuple(row.get(name, ())) for name in ("deviations", "infer_ms", "phases")}
    return EpisodeResult(**{**row, **tuples, "motion": motion})


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a success rate."""
    from scipy.stats import binomtest

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)

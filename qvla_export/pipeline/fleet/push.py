"""The step that brings a release to a fleet over ssh, wave by wave, and goes on where it ended.

A wave has passed when every robot of it has answered healthy; one that cannot be reached has not.
After the first that has not, no other robot is begun.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jetson.install.choice import choose
from jetson.install.release import RefusedRelease, Release
from jetson.install.trust import Catalogue
from qvla_export.pipeline.fleet.push_state import PushState, RobotOutcome
from qvla_export.pipeline.fleet.robot_link import Traffic, Unreachable, converse, update_command
from qvla_export.pipeline.fleet.robots_file import Fleet, FleetRobot
from qvla_export.pipeline.fleet.waves import DEFAULT_WAVES, Wave, divide
from qvla_export.pipeline.progress import OnProgress, Progress, ignore
from qvla_export.pipeline.release.repository import Repository
from qvla_export.shared.errors import QvlaError

# A connection that was cut is made again after these pauses; the robot goes on where it was.
_PAUSES_S = (1.0, 3.0, 10.0, 30.0)
_STAGES = ("connect", "install", "check", "probation")
_HEALTHY = {"proven": ("proven",), "checked": ("probation", "proven")}


@dataclass(frozen=True)
class PushRequest:
    """Which robots get what, in which order."""

    # robots.toml; what came of each robot is written beside it.
    robots: Path
    # Folder of the repository; None for the one that robots.toml names.
    repository: Path | None = None
    # How many robots are up to date after each wave.
    waves: tuple[str, ...] = DEFAULT_WAVES
    # At once.
    parallel: int = 16


@dataclass(frozen=True)
class PlannedRobot:
    """A robot and the release that it is to have."""

    robot: FleetRobot
    digest: str
    release: str
    # Of all its files; a robot fetches those that it lacks.
    release_bytes: int
    # Lists of releases, beside everyone's, that it reads: its own, its group's.
    groups: tuple[str, ...]


@dataclass(frozen=True)
class PushPlan:
    """What a push would do; nobody has been asked yet."""

    request: PushRequest
    fleet: Fleet
    robots: tuple[PlannedRobot, ...]
    waves: tuple[Wave, ...]
    # Robots that answered healthy with their release in an earlier push.
    done: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return it in words."""
        lines = []
        for i, wave in enumerate(self.waves):
            lines.append(f"wave {i + 1}, --wave {wave.size}:")
            for one in self.robots[wave.start : wave.stop]:
                how = ", done before" if one.robot.name in self.done else ""
                lines.append(
                    f"  {one.robot.name} ({one.robot.host}): {one.release} {one.digest[:16]}, at "
                    f"most {one.release_bytes / 1e6:.2f} MB{how}"
                )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla push --dry-run --json` prints."""
        names = [
            {
                "name": one.robot.name,
                "host": one.robot.host,
                "release": one.release,
                "digest": one.digest,
                "release_bytes": one.release_bytes,
                "done": one.robot.name in self.done,
            }
            for one in self.robots
        ]
        return {"waves": [{"size": w.size, "robots": names[w.start : w.stop]} for w in self.waves]}


@dataclass(frozen=True)
class PushedWave:
    """What came of a wave."""

    size: str
    passed: bool
    robots: tuple[RobotOutcome, ...]


@dataclass(frozen=True)
class PushResult:
    """What came of a push."""

    # Those that were begun.
    waves: tuple[PushedWave, ...]
    # Robots of the fleet that no wave has reached.
    left: int

    @property
    def passed(self) -> bool:
        """Whether every wave passed."""
        return all(wave.passed for wave in self.waves)

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla push --json` prints."""
        return {"passed": self.passed, **asdict(self)}

    def lines(self) -> list[str]:
        """Return it in words."""
        lines = []
        for i, wave in enumerate(self.waves):
            healthy = sum(one.answer == "healthy" for one in wave.robots)
            how = "passed" if wave.passed else "STOPPED"
            lines.append(f"wave {i + 1}: {how}, {healthy} of {len(wave.robots)} healthy")
            for one in wave.robots:
                before = ", in an earlier push" if one.before else ""
                sent = f", {one.sent_bytes / 1e6:.2f} MB sent" if one.sent_bytes else ""
                why = f": {one.reason}" if one.reason else ""
                lines.append(f"  {one.name}: {one.answer}{sent}{before}{why}")
        if self.left:
            lines.append(f"{self.left} robots were not touched; the same command goes on")
        return lines


def plan_push(request: PushRequest) -> PushPlan:
    """Read the fleet and choose every robot's release and wave; no robot is asked.

    Raises:
        ArtifactError: robots.toml or the repository is not one.
        QvlaError: the waves do not rise, or there is no release for a robot.
    """
    fleet = Fleet.load(request.robots, request.repository)
    catalogue = Repository(fleet.repository).catalogue()
    state = PushState.beside(request.robots)
    robots = tuple(_planned(robot, catalogue, fleet) for robot in fleet.robots)
    done = tuple(one.robot.name for one in robots if state.done(one.robot.name, one.digest))
    return PushPlan(request, fleet, robots, divide(len(robots), request.waves), done)


def push(
    plan: PushPlan,
    on_progress: OnProgress = ignore,
    sleep: Callable[[float], object] = time.sleep,
) -> PushResult:
    """Bring the releases to the robots, wave by wave, and stop at the first that is not healthy.

    Args:
        plan: who gets what.
        on_progress: hears of every robot.
        sleep: waits so many seconds, before a connection is made again.

    Raises:
        QvlaError: another push of these robots runs.
    """
    state = PushState.beside(plan.request.robots)
    waves: list[PushedWave] = []
    with state.hold():
        for wave in plan.waves:
            robots = plan.robots[wave.start : wave.stop]
            outcomes = _push_wave(plan, robots, state, on_progress, sleep)
            passed = all(one.answer == "healthy" for one in outcomes)
            waves.append(PushedWave(wave.size, passed, tuple(outcomes)))
            if not passed:
                break
    touched = sum(one.answer != "left out" for wave in waves for one in wave.robots)
    return PushResult(tuple(waves), len(plan.robots) - touched)


def _planned(robot: FleetRobot, catalogue: Catalogue, fleet: Fleet) -> PlannedRobot:
    groups = tuple(g for g in (robot.name, robot.group) if g in catalogue.groups)
    target = robot.settings.target
    try:
        if target is None:
            target = _only_target(catalogue)
        vouched = choose(catalogue.for_groups(groups), target, robot.settings.release)
    except RefusedRelease as error:
        raise QvlaError(f"robot {robot.name!r}: {error}") from None
    release = Release.read(Repository(fleet.repository).targets / vouched.name)
    return PlannedRobot(robot, release.digest, release.name, release.nbytes, groups)


def _only_target(catalogue: Catalogue) -> str:
    targets = sorted({str(one.custom.get("target")) for one in catalogue.releases()})
    if len(targets) != 1:
        raise RefusedRelease(
            "wrong target", f"set `target` in robots.toml; the repository has {targets}"
        )
    return targets[0]


def _push_wave(
    plan: PushPlan,
    robots: Sequence[PlannedRobot],
    state: PushState,
    on_progress: OnProgress,
    sleep: Callable[[float], object],
) -> list[RobotOutcome]:
    stopped = threading.Event()

    def one(planned: PlannedRobot) -> RobotOutcome:
        name = planned.robot.name
        if (before := state.done(name, planned.digest)) is not None:
            on_progress(Progress(name, state="kept"))
            return replace(before, sent_bytes=0, connections=0, before=True)
        if stopped.is_set():
            return RobotOutcome(name, planned.digest, "left out")
        outcome = _push_robot(plan.fleet, planned, on_progress, sleep)
        state.add(outcome)
        if outcome.answer != "healthy":
            stopped.set()
            on_progress(Progress(f"{name} {outcome.answer}: {outcome.reason}"))
        else:
            on_progress(Progress(name, state="made"))
        return outcome

    with ThreadPoolExecutor(min(plan.request.parallel, len(robots))) as pool:
        try:
            return list(pool.map(one, robots))
        except BaseException:
            # Ctrl-C: those that run are ended by the same signal, the others are not begun.
            stopped.set()
            raise


def _push_robot(
    fleet: Fleet,
    planned: PlannedRobot,
    on_progress: OnProgress,
    sleep: Callable[[float], object],
) -> RobotOutcome:
    robot = planned.robot
    traffic = Traffic(on_change=lambda t: on_progress(_progress(planned, t)))
    words = update_command(robot, planned.digest, planned.groups)
    reason, connections = "", 0

    def outcome(answer: Any) -> RobotOutcome:
        return RobotOutcome(
            robot.name, planned.digest, answer, reason, traffic.sent_bytes, connections
        )

    for pause_s in (*_PAUSES_S, None):
        connections += 1
        try:
            document = converse(fleet, robot, words, traffic)
        except Unreachable as error:
            reason = str(error)
            if error.hopeless:
                return outcome("unreachable")
        except (QvlaError, OSError) as error:
            reason = str(error)
            return outcome("failed")
        else:
            reason = _complaint(document, planned, robot)
            # A command that was cut off may hold the store for a moment.
            if document.get("refused") != "busy":
                return outcome("failed" if reason else "healthy")
        if pause_s is not None:
            sleep(pause_s)
    return outcome("failed" if reason.startswith("another command") else "unreachable")


def _complaint(document: dict[str, Any], planned: PlannedRobot, robot: FleetRobot) -> str:
    """Return why an answer is not healthy; nothing where it is."""
    if not document["ok"]:
        return str(document.get("error"))[:2000]
    if document.get("digest") != planned.digest:
        return f"it answers for release {str(document.get('digest'))[:16]}"
    if document.get("standing") not in _HEALTHY[robot.settings.healthy]:
        return str(document.get("why_not") or f"the release is {document.get('standing')}")[:2000]
    return ""


def _progress(planned: PlannedRobot, traffic: Traffic) -> Progress:
    stage = traffic.stage if traffic.stage in _STAGES else "busy"
    total = planned.release_bytes
    return Progress(planned.robot.name, min(traffic.sent_bytes, total), total, detail=stage)

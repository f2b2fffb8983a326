"""The step that measures bundles on a robot, its clocks held and its state recorded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from engines.trt.gpu import Gpu, find_gpu
from jetson.board.board_files import read_board_state
from jetson.board.board_tools import ask_board
from jetson.board.held_clocks import held_clocks, run_tool
from jetson.board.state import BoardState
from jetson.board.watch import BoardWatch
from qvla_export.pipeline.profile import ProfileRequest, profile_policies
from qvla_export.pipeline.progress import OnProgress, ignore

if TYPE_CHECKING:
    from jetson.latency.robot_profile import RobotProfile


@dataclass(frozen=True)
class RobotBoard:
    """How a board is read and told; a test has its own."""

    # Its state with its tools' help, and from files alone.
    ask: Callable[[], BoardState] = ask_board
    read: Callable[[], BoardState] = read_board_state
    run: Callable[[Sequence[str]], int] = run_tool
    gpu: Callable[[], Gpu | None] = find_gpu


@dataclass(frozen=True)
class RobotProfileRequest:
    """What a robot measures."""

    # Of bundles; each starts in a process of its own too, which tells its memory.
    profile: ProfileRequest
    # False leaves the clocks as they are.
    hold_clocks: bool = True
    board: RobotBoard = field(default_factory=RobotBoard)
    # Between two samples of the board, s.
    period_s: float = 2.0


def profile_robot(
    request: RobotProfileRequest, output: Path, on_progress: OnProgress = ignore
) -> "RobotProfile":
    """Measure, and write one file that a host's report reads.

    A machine that is no board is measured as it is; the file says so.

    Raises:
        ClocksNotHeld: it is a Jetson whose clocks cannot be held.
        QvlaError: as `profile_policies`.
    """
    from jetson.latency.robot_profile import BoardTime, RobotProfile

    board = request.board
    states = [board.ask()]
    with held_clocks(states[0], request.hold_clocks, board.run) as clocks:
        before = states[0] if clocks != "held" else board.ask()

        def sample() -> BoardState:
            states.append(board.read())
            return states[-1]

        wanted = replace(request.profile, cold_starts=request.profile.cold_starts or None)
        with BoardWatch(request.period_s, sample):
            comparison = profile_policies(wanted, None, on_progress)
        after = board.ask()
    gpu = board.gpu()
    # The board is one: as it was around all that was measured.
    profiles = tuple(
        replace(one, board_before=before, board_after=after) for one in comparison.profiles
    )
    profile = RobotProfile(
        datetime.now(UTC).isoformat(timespec="seconds"),
        clocks,
        "" if gpu is None else f"{gpu.name} {gpu.compute_capability}",
        BoardTime.of((*states, after)),
        replace(comparison, profiles=profiles),
    )
    profile.save(output)
    return profile

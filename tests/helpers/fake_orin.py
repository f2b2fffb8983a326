"""An AGX Orin in files whose jetson_clocks works, and which gets hot and slow if it is told to."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fake_board import orin, orin_files, write

from engines.trt.gpu import Gpu
from jetson.board.board_files import read_board_state
from jetson.board.state import BoardState
from qvla_export.pipeline.robot.board_profile import RobotBoard


class FakeOrin:
    """Implements what `RobotBoard` calls."""

    def __init__(self, root: Path, locked: bool = False, is_root: bool = True) -> None:
        self.root, self.is_root = orin(root, locked), is_root
        self.said: list[tuple[str, ...]] = []
        self.reads = 0

    def run(self, command: Sequence[str]) -> int:
        self.said.append(tuple(command))
        if not self.is_root:
            return 1
        if len(command) == 1:
            write(self.root, orin_files(True))
        elif command[1] == "--restore":
            assert Path(command[2]).parent.is_dir()
            write(self.root, orin_files(False))
        return 0

    def read(self) -> BoardState:
        self.reads += 1
        return read_board_state(self.root)

    def warm(self) -> BoardState:
        """Read a board that is hot and throttles at every other look."""
        state = self.read()
        hot = {"gpu": min(90.0, 61.5 + self.reads), "cpu": 50.0}
        counts = {name: n + self.reads for name, n in state.throttle_counts.items()}
        return replace(
            state, temperatures_c=hot, throttling=("gpu-throttle",), throttle_counts=counts
        )

    def board(self, read: Callable[[], BoardState] | None = None) -> RobotBoard:
        return RobotBoard(self.read, read or self.read, self.run, lambda: Gpu("Orin", "sm_87"))

"""Hold a Jetson's clocks for a measurement with its own jetson_clocks, and give them back.

The power mode is not changed: that may need a restart, and decides what a figure is of.
"""

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from jetson.board.state import BoardState
from qvla_export.shared.errors import QvlaError

# How the clocks were while something was measured.
Clocks = Literal["held", "held before", "as they were", "no board"]
_TOOL = "jetson_clocks"


class ClocksNotHeld(QvlaError):
    """A Jetson's clocks cannot be held."""


def run_tool(command: Sequence[str]) -> int:
    """Run one of a board's tools; return its exit code, 127 where there is none."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        return 127


@contextlib.contextmanager
def held_clocks(
    board: BoardState, hold: bool = True, run: Callable[[Sequence[str]], int] = run_tool
) -> Iterator[Clocks]:
    """Hold the clocks while the block runs; yield how they are.

    Args:
        board: as it is now.
        hold: False leaves them.
        run: runs a command and returns its exit code.

    Raises:
        ClocksNotHeld: it is a Jetson and jetson_clocks refuses; nothing was measured.
    """
    if not board.is_jetson:
        yield "no board"
    elif board.clocks_locked:
        yield "held before"
    elif not hold:
        yield "as they were"
    else:
        with tempfile.TemporaryDirectory(prefix="qvla-clocks-") as folder:
            stored = str(Path(folder) / "clocks")
            if run([_TOOL, "--store", stored]) != 0 or run([_TOOL]) != 0:
                raise ClocksNotHeld(
                    f"{_TOOL} does not hold this board's clocks, which only root may: run the "
                    "command with sudo, or measure with clocks that move: --as-is"
                )
            try:
                yield "held"
            finally:
                run([_TOOL, "--restore", stored])

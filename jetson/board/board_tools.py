"""Ask a board's own tools for what its files do not say: nvpmodel, jetson-stats, tegrastats.

That starts processes and takes up to seconds: before and after a measurement, never during one.
"""

import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from jetson.board.board_files import read_board_state
from jetson.board.jtop import read_jtop
from jetson.board.nvpmodel import mode_of_answer
from jetson.board.state import BoardState
from jetson.board.tegrastats import parse_tegrastats

_TIMEOUT_S = 5.0
# What goes on for ever -> its lines that are read; of what ends by itself, an answer's worth:
# `nvpmodel -q` may complain for some lines before it answers.
_LINES = {"tegrastats": 2}
_ANSWER_LINES = 50
# Command -> its first lines, empty where it fails.
Ask = Callable[[Sequence[str]], str]


def ask_board(
    root: Path = Path("/"),
    ask: Ask | None = None,
    jtop: Callable[[], BoardState] = read_jtop,
) -> BoardState:
    """Return the machine's state now, as complete as its tools make it; never an error.

    A plain Linux machine has no tools to ask: its files are all there is.

    Args:
        root: below which the files lie.
        ask: runs a command and returns what it prints.
        jtop: asks the service of jetson-stats.
    """
    state, ask = read_board_state(root), ask or first_lines
    if not state.is_jetson:
        return state
    if state.power_mode is None or state.power_mode.isdigit():
        mode = mode_of_answer(ask(["nvpmodel", "-q"]))
        state = state if mode is None else replace(state, power_mode=mode)
    state = state.filled_from(jtop())
    return state.filled_from(parse_tegrastats(ask(["tegrastats", "--interval", "200"])).to_state())


def first_lines(command: Sequence[str], lines: int | None = None) -> str:
    """Return the first lines a command prints, then end it; empty if it cannot be run.

    Args:
        command: program and arguments.
        lines: after which it is ended; None for as many as its answer may have.
    """
    lines = lines or _LINES.get(command[0], _ANSWER_LINES)
    try:
        process = subprocess.Popen(
            [*command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return ""
    # A tool that prints nothing must not hold a measurement up.
    timer = threading.Timer(_TIMEOUT_S, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        read = [process.stdout.readline() for _ in range(lines)]
    finally:
        timer.cancel()
        with suppress(OSError):
            process.kill()
        if process.stdout is not None:
            process.stdout.close()
        process.wait()
    return b"".join(read).decode(errors="replace")

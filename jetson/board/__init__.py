"""The board a latency was measured on, from /proc, /sys, dpkg, nvpmodel, tegrastats, jtop."""

from jetson.board.board_files import read_board_state
from jetson.board.board_tools import ask_board
from jetson.board.state import BoardState, ClockState

__all__ = ["BoardState", "ClockState", "ask_board", "read_board_state"]

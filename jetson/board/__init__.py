"""The board a latency was measured on, from /proc, /sys, dpkg, nvpmodel, tegrastats, jtop."""

from jetson.board.asking import ask_board
from jetson.board.reading import read_board_state
from jetson.board.state import BoardState, Clock

__all__ = ["BoardState", "Clock", "ask_board", "read_board_state"]

"""The error `FlashRefused`: why a BSP is not prepared or a board not flashed, by a name."""

from typing import Literal

from qvla_export.shared.errors import QvlaError

FlashReason = Literal[
    "no bsp",
    "binaries not applied",
    "missing kernel",
    "missing rootfs",
    "missing tool",
    "missing layout",
    "no overlay",
    "changed overlay",
    "foreign file",
    "not root's",
    "no space",
    "wrong board",
    "wrong storage",
    "wrong jetpack",
    "wrong runtime",
    "wrong power mode",
    "unknown base",
    "no board in recovery mode",
    "failed script",
]


class FlashRefused(QvlaError):
    """Something does not fit; the message begins with the reason's name."""

    def __init__(self, reason: FlashReason, text: str) -> None:
        super().__init__(f"{reason}: {text}")
        self.reason: FlashReason = reason

"""What makes figures of a machine worse than they could be: clocks, power, heat.

Every server looks at it when it starts: what the other checks need is not imported here.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from engines.trt.gpu import read_power_modes
from jetson.board.nvpmodel import fastest_mode
from jetson.board.state import BoardState
from jetson.doctor import power
from jetson.doctor.finding import BoardFinding, summary
from jetson.doctor.machine import Machine

if TYPE_CHECKING:
    from jetson.doctor.bundle_facts import BundleFacts


def examine_speed(
    machine: Machine, bundle: "BundleFacts | None" = None
) -> tuple[BoardFinding, ...]:
    """Return what makes figures of this machine worse than they could be: clocks, power, heat."""
    built_in, rebuild = None, None
    if bundle is not None:
        built_in, rebuild = bundle.power_mode, bundle.rebuild_command
    return (
        power.check_clocks_locked(machine.board),
        power.check_governor(machine.board),
        power.check_power_mode(machine, built_in, rebuild),
        power.check_throttling(machine.board),
        power.check_throttled(machine.board),
        power.check_over_current(machine),
    )


def slow_settings(board: BoardState, root: Path = Path("/")) -> str:
    """Return one line that names what makes a machine slow, and mends it; empty if nothing does.

    Args:
        board: as it was when figures were taken.
        root: below which nvpmodel's configuration lies.
    """
    modes, fastest = read_power_modes(root), fastest_mode(root)
    return summary(examine_speed(Machine(board, power_modes=modes, fastest_mode=fastest)))

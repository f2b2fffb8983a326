"""How the robot moved in closed loop, and how far its actions were from float's where it went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qvla_export.report.cells import NONE, Cell, Table

_COLUMNS = (
    "Setting",
    "Steps to success",
    "Jerk, m/s³",
    "Gripper flips",
    "Seam jumps, mm",
    "‖ΔA‖² on policy",
)


@dataclass(frozen=True)
class MotionFigures:
    """Motion over the episodes of one setting; None or empty where it was not recorded."""

    # Mean control steps of the solved ones.
    steps_to_success: float | None
    # Means over episodes of the RMS and of the 99 % quantile, m/s^3.
    jerk: tuple[float, float] | None
    # Mean over episodes.
    gripper_flips: float | None
    # RMS and 99 % quantile over all seams of two chunks, mm.
    seams_mm: tuple[float, float] | None
    # Mean over decisions of ||dA||^2, and of those of each phase; normalized units.
    on_policy: float | None
    by_phase: Mapping[str, float]


def motion_of(results: Sequence[Mapping[str, Any]]) -> MotionFigures:
    """Return the figures of raw episodes; what is misshapen raises anything."""
    moved = [row["motion"] for row in results if row.get("motion") is not None]
    whole = len(moved) == len(results)
    steps = [int(row["steps"]) for row in results if row["success"]]
    jumps = [float(jump) for motion in moved for jump in motion["seam_jumps_mm"]]
    decided = [float(value) for row in results for value in row["deviations"]]
    phases = [str(name) for row in results for name in row.get("phases", ())]
    named = list(zip(phases, decided, strict=True)) if len(phases) == len(decided) else []
    return MotionFigures(
        steps_to_success=float(np.mean(steps)) if steps else None,
        jerk=(_mean(moved, "jerk_rms"), _mean(moved, "jerk_p99")) if whole else None,
        gripper_flips=_mean(moved, "gripper_flips") if whole else None,
        seams_mm=_spread(jumps) if whole and jumps else None,
        on_policy=float(np.mean(decided)) if decided else None,
        by_phase={
            phase: float(np.mean([value for own, value in named if own == phase]))
            for phase in dict.fromkeys(own for own, _ in named)
        },
    )


def _mean(moved: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([float(motion[name]) for motion in moved]))


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return float(np.sqrt(np.square(values).mean())), float(np.quantile(values, 0.99))


def motion_table(moved: Mapping[str, MotionFigures], held_out: Mapping[str, float]) -> Table:
    """Return a row a setting; none where no motion was recorded.

    Args:
        moved: by setting.
        held_out: mean ||dA||^2 of the held-out observations, of settings that have it.
    """
    phases = tuple(dict.fromkeys(phase for figures in moved.values() for phase in figures.by_phase))
    rows = tuple(
        (
            Cell(name),
            Cell(_number(figures.steps_to_success)),
            _pair(figures.jerk),
            Cell(_number(figures.gripper_flips)),
            _pair(figures.seams_mm),
            _error(figures.on_policy, held_out.get(name)),
            *(_error(figures.by_phase.get(phase), None) for phase in phases),
        )
        for name, figures in moved.items()
        if figures.jerk is not None
    )
    return Table((*_COLUMNS, *(f"in {phase}" for phase in phases)), rows)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _pair(values: tuple[float, float] | None) -> Cell:
    return Cell(NONE) if values is None else Cell(f"{values[0]:.3g}", f"99 % {values[1]:.3g}")


def _error(value: float | None, other: float | None) -> Cell:
    if value is None:
        return Cell(NONE)
    return Cell(f"{value:.3g}", f"{value / other:.2f}× held-out" if other else "")

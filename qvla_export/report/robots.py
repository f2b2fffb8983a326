"""What robots measured of a run's bundles, beside what was predicted: files of RUN/robots."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvla_export.report.cells import NONE, Cell, Table
from qvla_export.report.measured import Latency, damage_named, finite, latencies_of, read_object
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.latency_statistics import tail

FOLDER, FORMAT = "robots", "qvla-robot-report-1"
_COLUMNS = (
    "Setting", "Board", "Predicted", "Measured", "Measured / predicted", "Memory", "Board's state",
)  # fmt: skip


@dataclass(frozen=True)
class RobotMeasurement:
    """One setting on one robot."""

    setting: str
    # File that it came in.
    robot: str
    machine: str
    # "JetPack 6.2, MAXN".
    conditions: str
    clocks: str
    latency: Latency
    # Milliseconds predicted, and between which; None where nothing was, with the reason.
    predicted_ms: tuple[float, float, float] | None
    why_not: str
    # Hottest thermal zone, degrees Celsius; what slowed the board down.
    hottest: tuple[str, float] | None
    throttling: tuple[str, ...]


def read_robots(run: Path) -> tuple[RobotMeasurement, ...]:
    """Read what robots measured of a run's bundles, by file and setting.

    Raises:
        ArtifactError: a file is damaged; remove it, or give the robot's file to the report again.
    """
    folder = run / FOLDER
    return tuple(row for path in sorted(folder.glob("*.json")) for row in _read(path))


def robot_table(measured: tuple[RobotMeasurement, ...]) -> Table:
    """Return predicted beside measured, a row a setting and robot."""
    return Table(_COLUMNS, tuple(_row(one) for one in measured))


def _read(path: Path) -> Iterator[RobotMeasurement]:
    value = read_object(path, "robot's profile", ("format", "settings", "predicted", "profile"))
    if value["format"] != FORMAT:
        raise ArtifactError(
            f"{path} must be of format {FORMAT!r}; remove it and give the robot's own file: "
            "qvla report RUN --robot FILE"
        )
    with damage_named(path, "robot's profile"):
        profile = value["profile"]
        latencies = latencies_of(profile["comparison"])
        board = profile["comparison"]["profiles"][0]["board_before"]
        zones = {str(zone): float(finite(c)) for zone, c in profile["time"]["hottest_c"].items()}
        counts = {str(k): int(n) for k, n in profile["time"]["throttle_counts"].items() if n > 0}
        slowed = (
            *map(str, profile["time"]["throttling"]),
            *(f"{k} {n}×" for k, n in counts.items()),
        )
        for name, latency in latencies.items():
            predicted = value["predicted"][name]
            keys = ("predicted_ms", "low_ms", "high_ms")
            ms = tuple(float(finite(predicted[key])) for key in keys if key in predicted)
            yield RobotMeasurement(
                str(value["settings"][name]),
                path.stem,
                latency.machine,
                _conditions(board),
                str(profile["clocks"]),
                latency,
                (ms[0], ms[1], ms[2]) if len(ms) == len(keys) else None,
                str(predicted.get("why_not", "")),
                max(zones.items(), key=lambda item: item[1], default=None),
                slowed,
            )


def _conditions(board: dict[str, Any]) -> str:
    jetpack = f"JetPack {board['jetpack']}" if board.get("jetpack") else ""
    return ", ".join(filter(None, (jetpack, str(board.get("power_mode") or ""))))


def _row(one: RobotMeasurement) -> tuple[Cell, ...]:
    median = one.latency.percentile(50)
    total_ms = one.latency.samples_ms["total"]
    name, worst = tail(total_ms)
    if one.predicted_ms is None:
        predicted, ratio = Cell(NONE, one.why_not), Cell(NONE)
    else:
        ms, low, high = one.predicted_ms
        predicted = Cell(f"{ms:.3g} ms", f"[{low:.3g}, {high:.3g}]")
        ratio = Cell(f"{median / ms:.2f}×", "" if low <= median <= high else "outside the range")
    hottest = "" if one.hottest is None else f"{one.hottest[0]} {one.hottest[1]:.0f} °C"
    return (
        Cell(one.setting, one.robot),
        Cell(one.machine, one.conditions),
        predicted,
        Cell(
            f"{median:.2f} ms",
            f"{name}\u00a0{worst:.2f}\u00a0ms, n\u00a0{len(total_ms)}",
        ),
        ratio,
        Cell(_size(one.latency.resident_bytes), f"GPU {_size(one.latency.device_bytes)}"),
        Cell(f"clocks {one.clocks}", ", ".join(filter(None, (hottest, *one.throttling)))),
    )


def _size(nbytes: int | None) -> str:
    return NONE if nbytes is None else f"{nbytes / 1e6:.0f} MB"

"""The noun `RobotProfile`: what a robot measured of itself, in one file for the host."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from jetson.board.held_clocks import Clocks
from jetson.board.state import BoardState
from jetson.latency.comparison import LatencyComparison
from jetson.latency.latency_texts import profile_texts
from qvla_export.shared.artifacts import read_json, write_json
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.tables.text_table import TextTable

FORMAT = "qvla-robot-profile-1"
_REMEDY = "measure anew with `qvla robot profile`"


@dataclass(frozen=True)
class BoardTime:
    """A board while something was measured on it, sampled at a low rate."""

    samples: int
    # Thermal zone -> highest degrees Celsius.
    hottest_c: Mapping[str, float]
    # What slowed the board down at some sample, and by how much its counters of that rose.
    throttling: tuple[str, ...]
    throttle_counts: Mapping[str, int]

    @staticmethod
    def of(states: tuple[BoardState, ...]) -> "BoardTime":
        """Return what states in the order of time say together."""
        first = states[0].throttle_counts
        zones = {zone for state in states for zone in state.temperatures_c}
        return BoardTime(
            len(states),
            {z: max(s.temperatures_c.get(z, -273.15) for s in states) for z in sorted(zones)},
            tuple(sorted({name for state in states for name in state.throttling})),
            {
                name: max(s.throttle_counts.get(name, count) for s in states) - count
                for name, count in first.items()
            },
        )

    @staticmethod
    def from_json(value: Any) -> "BoardTime":
        """Read what `asdict` made of it.

        Raises:
            ArtifactError: it is damaged.
        """
        try:
            return BoardTime(
                int(value["samples"]),
                {str(zone): float(c) for zone, c in value["hottest_c"].items()},
                tuple(str(name) for name in value["throttling"]),
                {str(name): int(count) for name, count in value["throttle_counts"].items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"a board's time is damaged ({error}); {_REMEDY}") from None


@dataclass(frozen=True)
class RobotProfile:
    """Latency and memory of bundles on a robot, and the board's state while they were taken."""

    # ISO 8601.
    created: str
    clocks: Clocks
    # "Orin sm_87"; empty without one.
    gpu: str
    time: BoardTime
    comparison: LatencyComparison

    @property
    def board(self) -> BoardState:
        """The board as it was at first."""
        return self.comparison.profiles[0].board_before

    def doubts(self) -> Iterator[str]:
        """Yield what a reader of the figures has to know."""
        board, after = self.board, self.comparison.profiles[0].board_after
        if not board.is_jetson:
            yield f"no board: {board.model or board.cpu_model or 'this machine'} is no Jetson"
        elif self.clocks == "as they were":
            yield "the clocks were not held"
        if board.power_mode != after.power_mode:
            yield f"the power mode changed from {board.power_mode} to {after.power_mode}"
        if self.time.throttling:
            yield f"the board was slowed down: {', '.join(self.time.throttling)}"
        for name, count in self.time.throttle_counts.items():
            if count > 0:
                yield f"{name} {count} times"

    def texts(self) -> Iterator[str | TextTable]:
        """Yield the figures, the board and the doubts, for a reader at a terminal."""
        yield from profile_texts(self.comparison)
        board = self.board
        jetpack = f", JetPack {board.jetpack} (Jetson Linux {board.l4t})" if board.l4t else ""
        hottest = max(self.time.hottest_c.items(), key=lambda item: item[1], default=None)
        yield (
            f"board: {board.model or board.cpu_model}{jetpack}, power mode "
            f"{board.power_mode or 'unknown'}, clocks: {self.clocks}"
            + ("" if hottest is None else f", hottest {hottest[0]} {hottest[1]:.0f} C")
        )
        for doubt in self.doubts():
            yield f"note: {doubt}"

    def to_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        return {
            "format": FORMAT,
            "created": self.created,
            "clocks": self.clocks,
            "gpu": self.gpu,
            "time": asdict(self.time),
            "comparison": self.comparison.to_json(),
        }

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "RobotProfile":
        """Read a robot's file, which may come from anybody.

        Raises:
            ArtifactError: it is missing, damaged or of another format.
        """
        value = read_json(path, "robot's profile")
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            found = value.get("format") if isinstance(value, dict) else None
            raise ArtifactError(
                f"{path} must be a robot's profile of format {FORMAT!r}, it has {found!r:.60}; "
                f"{_REMEDY}"
            )
        texts = [value.get(name) for name in ("created", "clocks", "gpu")]
        names = {part.name for part in fields(cls)}
        if not names <= set(value) or not all(isinstance(t, str) and len(t) < 200 for t in texts):
            raise ArtifactError(f"{path} lacks some of {sorted(names)}; {_REMEDY}")
        if value["clocks"] not in get_args(Clocks):
            raise ArtifactError(f"{path}: clocks must be one of {get_args(Clocks)}; {_REMEDY}")
        return cls(
            value["created"],
            value["clocks"],
            value["gpu"],
            BoardTime.from_json(value["time"]),
            LatencyComparison.from_json(value["comparison"], str(path)),
        )

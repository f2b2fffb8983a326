"""The noun `Comparison`: all contestants' rows, controls, channels' sensitivities; and its JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qvla_export.comparison.contestants import parse_contestant
from qvla_export.comparison.rows import Cost, Outcome, Row, SeedRow
from qvla_export.shared.artifacts import read_json, require_fields, versions, write_json
from qvla_export.shared.errors import ArtifactError, QvlaError

_FORMAT = "qvla-comparison-1"
FLOAT = "float"
_AGAIN = "make it anew: qvla compare"


@dataclass(frozen=True)
class Ranks:
    """Channels ranked by their effect on one decision and along episodes (Fig. 7)."""

    bits: int
    # Observations of either; of one decision, and along episodes.
    observations: tuple[int, int]
    # Layer, channel, single-step and cumulative sensitivity.
    channels: tuple[tuple[str, int, float, float], ...] = field(repr=False)
    spearman: float
    # Share of the channels whose two ranks differ by at most a tenth of their number.
    near_diagonal: float


@dataclass(frozen=True)
class Comparison:
    """What `qvla compare` measured."""

    # Digest of the float policy; the command; machine; what the run was told.
    policy_digest: str
    command: str
    machine: Mapping[str, str]
    settings: Mapping[str, Any]
    # In the order they were asked for, float first.
    rows: tuple[Row, ...] = ()
    # Control -> episodes of the float policy under it, of all seeds.
    controls: Mapping[str, tuple[Outcome, ...]] = field(default_factory=dict)
    # Module -> width -> sum over its channels of the first seed's sensitivities (Fig. 1a).
    modules: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # Width -> percentiles 0 to 100 of its channels' sensitivities (Fig. 1b).
    channels: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    ranks: Ranks | None = None
    made_with: Mapping[str, str] = field(default_factory=versions)

    def __repr__(self) -> str:
        seeds = max((len(row.seeds) for row in self.rows), default=0)
        return (
            f"<Comparison: {len(self.rows)} contestants, {seeds} seeds, "
            f"policy {self.policy_digest[:8]}>"
        )

    def row(self, name: str) -> Row | None:
        """Return a contestant's row, if it is in."""
        return next((row for row in self.rows if row.name == name), None)

    def with_row(self, row: Row) -> "Comparison":
        """Return the comparison with a contestant's row added, or in the place of the former."""
        if self.row(row.name) is None:
            return replace(self, rows=(*self.rows, row))
        return replace(self, rows=tuple(row if old.name == row.name else old for old in self.rows))

    def save(self, path: Path) -> None:
        """Write JSON atomically, with each row's pooled figures beside what they are made of."""
        value = {"format": _FORMAT, **asdict(self)}
        for told, row in zip(value["rows"], self.rows, strict=True):
            told["pooled"] = self._pooled(row)
        write_json(path, value)

    def _pooled(self, row: Row) -> dict[str, Any]:
        reference = self.row(FLOAT)
        paired = None if reference is None else row.against(reference)
        return {
            "rms": row.rms,
            "rms_spread": row.rms_spread,
            "mean_abs_physical": row.physical,
            "weight_bytes": row.weight_bytes,
            "ratio": row.ratio,
            "bits_per_channel": row.mean_cost("bits_per_channel"),
            "bits_per_weight": row.mean_cost("bits_per_weight"),
            "stored_bits_per_weight": row.mean_cost("stored_bits_per_weight"),
            "seconds": row.total_seconds,
            "cpu_seconds": row.total_cpu_seconds,
            "episodes": len(row.episodes),
            "success": row.success,
            "wilson_95": row.interval,
            "cumulative_deviation": row.deviation,
            "jerk_rms_and_gripper_flips": row.motion,
            "against_float": None if paired is None else {**asdict(paired), "value": paired.value},
        }

    @staticmethod
    def load(path: Path) -> "Comparison":
        """Read what `save` wrote; pooled figures are computed anew.

        Raises:
            ArtifactError: the file is missing, damaged or of another kind.
        """
        value = read_json(path, "comparison")
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise ArtifactError(f"{path} is no comparison of format {_FORMAT}; {_AGAIN}")
        require_fields(value, Comparison.__dataclass_fields__, f"comparison {path}")
        try:
            return _from_json(value)
        except (AttributeError, KeyError, TypeError, ValueError, QvlaError) as error:
            raise ArtifactError(f"comparison {path} is damaged: {error}; {_AGAIN}") from error


def _from_json(value: Mapping[str, Any]) -> Comparison:
    rows = tuple(
        Row(parse_contestant(row["name"]).name, tuple(map(_seed_row, row["seeds"])))
        for row in value["rows"]
    )
    ranks = value["ranks"]
    return Comparison(
        policy_digest=str(value["policy_digest"]),
        command=str(value["command"]),
        machine={str(k): str(v) for k, v in value["machine"].items()},
        settings=dict(value["settings"]),
        rows=rows,
        controls={str(k): tuple(map(_outcome, v)) for k, v in value["controls"].items()},
        modules={
            str(k): {str(int(b)): _number(s) for b, s in v.items()}
            for k, v in value["modules"].items()
        },
        channels={str(int(b)): _numbers(v) for b, v in value["channels"].items()},
        ranks=None if ranks is None else _ranks(ranks),
        made_with={str(k): str(v) for k, v in value["made_with"].items()},
    )


def _seed_row(value: Mapping[str, Any]) -> SeedRow:
    if value["engine"] not in ("onnxruntime", "torch"):
        raise ValueError(f"unknown engine {value['engine']!r:.40}")
    return SeedRow(
        seed=int(value["seed"]),
        digest=str(value["digest"]),
        engine=value["engine"],
        cost=Cost(**{name: _number(value["cost"][name]) for name in Cost.__dataclass_fields__}),  # type: ignore[arg-type]  # whole numbers stay whole
        held_out=int(value["held_out"]),
        rms=_number(value["rms"]),
        normalized=_numbers(value["normalized"]),
        physical=_numbers(value["physical"]),
        seconds={str(k): _number(v) for k, v in value["seconds"].items()},
        cpu_seconds={str(k): _number(v) for k, v in value["cpu_seconds"].items()},
        library=None if value["library"] is None else str(value["library"]),
        episodes=tuple(map(_outcome, value["episodes"])),
        cumulative=_numbers(value["cumulative"]),
    )


def _outcome(value: Mapping[str, Any]) -> Outcome:
    if not isinstance(value["solved"], bool):
        raise ValueError(f"an episode is solved or not, got {value['solved']!r:.40}")
    deviation = value["deviation"]
    return Outcome(
        str(value["task"]),
        int(value["seed"]),
        value["solved"],
        None if deviation is None else _number(deviation),
        str(value.get("scene", "")),
        None if (jerk := value.get("jerk_rms")) is None else _number(jerk),
        None if (flips := value.get("gripper_flips")) is None else int(flips),
    )


def _ranks(value: Mapping[str, Any]) -> Ranks:
    single, along = value["observations"]
    return Ranks(
        bits=int(value["bits"]),
        observations=(int(single), int(along)),
        channels=tuple(
            (str(n), int(c), _number(a), _number(b)) for n, c, a, b in value["channels"]
        ),
        spearman=_number(value["spearman"]),
        near_diagonal=_number(value["near_diagonal"]),
    )


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(_number(value) for value in values)


def _number(value: Any) -> float:
    """Read a finite number; whole ones stay whole."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"not a finite number: {value!r:.40}")
    return value

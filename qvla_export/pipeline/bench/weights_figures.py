"""What a comparison of quantized published weights says: what was asked, rows, a table."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvla_export.shared.artifacts import versions, write_json
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.tables.text_table import TextTable, megabytes


@dataclass(frozen=True)
class WeightsRequest:
    """Which network, at which widths, beside which methods, on how many observations."""

    backbone: str
    bits: tuple[int, ...]
    # "rtn", or libraries' methods (`baselines.methods.METHODS`).
    methods: tuple[str, ...]
    # Observations to measure on, and to judge by.
    count: int = 32
    held_out: int = 32
    # Of drawing, probes and libraries.
    seed: int = 0
    # Steps of a learned method, each block.
    iterations: int = 200
    # Inputs or channels whose moments are kept together; None for as many as usual.
    largest_block: int | None = None
    # Whether our codes are tuned together, see `measurement.code_tuning`.
    tune_codes: bool = False


@dataclass(frozen=True)
class ErrorRatio:
    """Geometric mean over observations of one error over another's, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class WeightsRow:
    """One method at one width."""

    bits: int
    method: str
    # Of codes, scales and all else that the quantized layers are stored with.
    weight_bytes: int
    # Root mean square over observations of the change's length over the output's.
    relative_error: float
    # Mean over tokens of the cosine with the float network's output.
    cosine: float
    # Mean negative log-likelihood of a next token, nats; None for pictures.
    nll: float | None
    # CPU seconds of making the codes; None where they were not recorded.
    cpu_s: float | None
    # Our error over this one's; None for ours.
    ours_over: ErrorRatio | None = None


@dataclass(frozen=True)
class WeightsComparison:
    """A published network, quantized."""

    request: WeightsRequest
    # What is judged, and what it was measured on.
    output: str
    source: Mapping[str, Any]
    policy_digest: str
    calibration_digest: str
    # Of the float network; None for pictures.
    float_nll: float | None
    # CPU seconds of moments and sensitivities, which all widths share.
    measuring_cpu_s: float
    rows: tuple[WeightsRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values, with the versions that made it."""
        return {**asdict(self), "source": dict(self.source), "versions": versions()}

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        write_json(path, self.to_json())

    def texts(self) -> Iterator[str | TextTable]:
        """Yield the table and what it is of, for a terminal."""
        columns = ("bits", "method", "MB", "relative error", "cosine", "nll", "ours over it", "cpu")
        yield TextTable(columns, title=self.request.backbone, words=("method",)).with_rows(
            (
                str(row.bits),
                row.method,
                megabytes(row.weight_bytes),
                f"{row.relative_error:.4f}",
                f"{row.cosine:.4f}",
                "" if row.nll is None else f"{row.nll:.3f}",
                str(row.ours_over or ""),
                "" if row.cpu_s is None else f"{row.cpu_s:.0f} s",
            )
            for row in self.rows
        )
        if self.float_nll is not None:
            yield f"float: {self.float_nll:.3f} nats a token"
        yield (
            f"error of: {self.output}; {self.request.held_out} held-out observations, measured on "
            f"{self.request.count}; moments and sensitivities took {self.measuring_cpu_s:.0f} CPU s"
        )


def parse_methods(text: str) -> tuple[str, ...]:
    """Read names of methods from a text such as "max,gptq"; each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def parse_widths(text: str) -> tuple[int, ...]:
    """Read widths from a text such as "4,3,2".

    Raises:
        QvlaError: it is no list of whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise QvlaError(f"widths are whole numbers separated by commas, as in 4,3,2; got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))

"""The figures of a run's baselines, for tables and reports."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvla_export.baselines.baseline import Baseline
from qvla_export.baselines.methods import METHODS
from qvla_export.shared.artifacts import read_json, require_fields
from qvla_export.shared.errors import ArtifactError

_BASELINE = "baseline"
_ERROR = "action_error.json"
_EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class BaselinePaths:
    """Where a setting's baseline and its figures lie in a run folder."""

    folder: Path

    @property
    def baseline(self) -> Path:
        """Return the folder of codes, scales and their provenance."""
        return self.folder / _BASELINE

    @property
    def action_error(self) -> Path:
        """Return the file of the held-out action error; fields as in our own settings' files."""
        return self.folder / _ERROR

    @property
    def evaluation(self) -> Path:
        """Return the file of the closed-loop evaluation, in the format of our own settings'."""
        return self.folder / _EVALUATION


@dataclass(frozen=True)
class BaselineResult:
    """One baseline's figures."""

    # "w4-awq"; its method, what that stands for, and the library with its version.
    setting: str
    method: str
    stands_for: str
    library: str
    bits: int
    activation_bits: int | None
    mean_bits_per_channel: float
    stored_bits_per_weight: float
    # Packed, scales included; and as a share of float16.
    weight_bytes: int
    ratio: float
    # Wall-clock of the library's work.
    seconds: float
    # Held-out action error: "rms", "mean_abs_normalized", ...; None where it was not measured.
    action_error: dict[str, Any] | None
    # File of the closed-loop evaluation; None where there is none.
    evaluation: Path | None


def baseline_paths(run: Path, setting: str) -> BaselinePaths:
    """Return the paths of a setting's baseline.

    Args:
        run: the run folder.
        setting: its name, such as "w4-awq".
    """
    return BaselinePaths(run / "settings" / setting)


def baseline_results(run: Path) -> tuple[BaselineResult, ...]:
    """Return the figures of all baselines in a run folder, ordered by setting.

    Raises:
        ArtifactError: a file is damaged, or an error was measured on another baseline.
    """
    found = sorted((run / "settings").glob(f"*/{_BASELINE}"))
    return tuple(_result(BaselinePaths(path.parent)) for path in found)


def _result(paths: BaselinePaths) -> BaselineResult:
    baseline = Baseline.load(paths.baseline)
    request = baseline.request
    return BaselineResult(
        setting=request.setting,
        method=request.method,
        stands_for=METHODS[request.method].stands_for,
        library=", ".join(f"{name} {version}" for name, version in baseline.libraries.items()),
        bits=request.bits,
        activation_bits=request.activation_bits,
        mean_bits_per_channel=baseline.mean_bits_per_channel,
        stored_bits_per_weight=baseline.stored_bits_per_weight,
        weight_bytes=baseline.weight_bytes,
        ratio=baseline.weight_bytes / baseline.float16_bytes,
        seconds=baseline.seconds,
        action_error=_error(paths.action_error, baseline),
        evaluation=paths.evaluation if paths.evaluation.is_file() else None,
    )


def _error(path: Path, baseline: Baseline) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    value = read_json(path, "action error")
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is no action error; make it anew: qvla baseline")
    require_fields(value, ("baseline_digest", "rms"), f"action error {path}")
    if value["baseline_digest"] != baseline.digest:
        raise ArtifactError(
            f"{path} was measured on baseline {str(value['baseline_digest'])[:16]}, beside it is "
            f"{baseline.digest[:16]}; measure again: qvla baseline"
        )
    return value

"""The noun `HeldOutError`: how far actions are from the float policy's, and the file of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qvla_export.pipeline.run_folder import load_if_current
from qvla_export.shared.artifacts import read_json, require_fields, write_json
from qvla_export.shared.errors import ArtifactError

if TYPE_CHECKING:
    from engines.drift import ActionDrift
    from qvla_export.graph.golden import TokenDivergence

# What an error is measured on; its digest's key in the file begins with it.
Kind = Literal["bundle", "plan", "baseline"]
_KINDS: tuple[Kind, ...] = ("bundle", "plan", "baseline")
_FIGURES = (
    "held_out",
    "mse",
    "rms",
    "mean_abs_normalized",
    "max_abs_normalized",
    "mean_abs_physical",
    "cosine",
)
_OPTIONAL = ("median_rms", "engine_drift_max", "token_kl", "expected_rms")


@dataclass(frozen=True)
class ErrorSubject:
    """What an action error is measured on; another value of any field is another measurement."""

    # Name of the setting, and digest of its bundle, plan or baseline.
    setting: str
    kind: Kind
    digest: str
    calibration_digest: str
    # "torch" or an engine's.
    runtime: str

    def to_json(self) -> dict[str, str]:
        """Return what the file states of it."""
        return {
            "setting": self.setting,
            f"{self.kind}_digest": self.digest,
            "calibration_digest": self.calibration_digest,
            "runtime": self.runtime,
        }


@dataclass(frozen=True)
class HeldOutError:
    """How far a setting's actions are from the float policy's, on held-out observations."""

    subject: ErrorSubject
    # Observations.
    held_out: int
    # Squared error of a whole chunk, averaged over observations; normalized (the range is 2).
    mse: float
    # Root mean square difference over all actions and dimensions, normalized.
    rms: float
    # Of each dimension of the action: |difference|, normalized and in the robot's units.
    mean_abs_normalized: tuple[float, ...]
    max_abs_normalized: tuple[float, ...]
    mean_abs_physical: tuple[float, ...]
    # Between all actions as one vector; 1 is equal.
    cosine: float
    # Median over observations of each one's root mean square difference, normalized; None where an
    # earlier version measured.
    median_rms: float | None = None
    # Largest normalized difference of the engine from torch with the same weights; None where no
    # engine ran.
    engine_drift_max: float | None = None
    # Divergence of the distributions over an action's tokens from the float policy's, in nats
    # (eq. 2, `graph.golden.token_divergence`); None where actions are no tokens, of float settings
    # and where weights were left on disk.
    token_kl: float | None = None
    # Root mean square difference of the expected actions, given the float policy's tokens; None
    # where `token_kl` is, and where an earlier version measured.
    expected_rms: float | None = None

    def __repr__(self) -> str:
        return (
            f"<HeldOutError of {self.subject.setting}: RMS {self.rms:.2g} of normalized actions "
            f"(the range is 2), cosine {self.cosine:.6f}, on {self.held_out} observations>"
        )

    def to_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        figures: dict[str, Any] = {name: getattr(self, name) for name in _FIGURES}
        more = {name: getattr(self, name) for name in _OPTIONAL}
        figures |= {name: value for name, value in more.items() if value is not None}
        return {**self.subject.to_json(), **figures}

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        write_json(path, self.to_json())

    @staticmethod
    def load(path: Path) -> "HeldOutError":
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        value = read_json(path, "action error")
        found = isinstance(value, dict) and [k for k in _KINDS if f"{k}_digest" in value]
        if not found:
            raise ArtifactError(f"{path} is no action error; remove it to measure anew")
        require_fields(value, ("setting", "calibration_digest", "runtime", *_FIGURES), str(path))
        try:
            return _from_json(found[0], value)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged: {error}; remove it to measure anew") from error


def held_out_error(
    subject: ErrorSubject,
    drift: "ActionDrift",
    chunk_numbers: int,
    tokens: "TokenDivergence | None",
    engine_drift_max: float | None = None,
) -> HeldOutError:
    """Return the error that a difference of actions comes to.

    Args:
        subject: what acted.
        drift: its difference from the float policy.
        chunk_numbers: numbers in one chunk, horizon times dimensions.
        tokens: what it does to the tokens of an action; None where actions are none.
        engine_drift_max: see `HeldOutError`.
    """
    return HeldOutError(
        subject,
        held_out=drift.observations,
        mse=drift.rms**2 * chunk_numbers,
        rms=drift.rms,
        mean_abs_normalized=tuple(drift.mean_normalized.tolist()),
        max_abs_normalized=tuple(drift.max_normalized.tolist()),
        mean_abs_physical=tuple(drift.mean_physical.tolist()),
        cosine=drift.cosine,
        median_rms=drift.median_rms,
        engine_drift_max=engine_drift_max,
        token_kl=None if tokens is None else tokens.kl,
        expected_rms=None if tokens is None else tokens.expected_rms,
    )


def load_error_if_current(path: Path, subject: ErrorSubject) -> HeldOutError | None:
    """Load the error measured on this very subject, if the file holds it."""
    return load_if_current(path, HeldOutError.load, lambda old: old.subject == subject)


def _from_json(kind: Kind, value: dict[str, Any]) -> HeldOutError:
    subject = ErrorSubject(
        str(value["setting"]),
        kind,
        str(value[f"{kind}_digest"]),
        str(value["calibration_digest"]),
        str(value["runtime"]),
    )
    normalized, largest, physical = (
        tuple(map(float, value[name]))
        for name in ("mean_abs_normalized", "max_abs_normalized", "mean_abs_physical")
    )
    more = {name: float(value[name]) for name in _OPTIONAL if value.get(name) is not None}
    return HeldOutError(
        subject,
        held_out=int(value["held_out"]),
        mse=float(value["mse"]),
        rms=float(value["rms"]),
        mean_abs_normalized=normalized,
        max_abs_normalized=largest,
        mean_abs_physical=physical,
        cosine=float(value["cosine"]),
        **more,
    )

"""Errors worth catching. Every message says the rule, the value and the remedy.

QvlaError (ValueError)
├── CheckpointError      a checkpoint's files or keys do not fit the policy family
├── StatisticsError      an un-normalization key or its statistics are missing
├── ArtifactError        an artifact is damaged, truncated or of another format
│   └── ArtifactMismatch two artifacts do not belong together
│       └── PlanMismatch a bit plan was made for another policy
├── FinishedWork         what took long would be thrown away
├── InvalidObservation   an observation breaks the policy's contract
└── MissingExtra         a library is needed that this installation lacks
"""

# Top-level package that only some installations have -> extra of `qvla` that brings it.
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "onnx", "onnx_ir", "onnxscript"), "host"),
    **dict.fromkeys(("scipy", "matplotlib", "jinja2", "pyarrow", "ml_dtypes", "h5py"), "host"),
    **dict.fromkeys(("mujoco", "metaworld", "gymnasium", "OpenGL"), "sim"),
    **dict.fromkeys(("pex", "uv", "pip", "packaging"), "runtime"),
}


class QvlaError(ValueError):
    """Base of all errors a user can mend; the command line prints it without a traceback."""


class CheckpointError(QvlaError):
    """A checkpoint's files or keys do not fit the policy family."""


class StatisticsError(QvlaError):
    """An un-normalization key or its statistics are missing."""


class ArtifactError(QvlaError):
    """An artifact is damaged, truncated or of another format."""


class ArtifactMismatch(ArtifactError):
    """Two artifacts do not belong together."""


class PlanMismatch(ArtifactMismatch):
    """A bit plan was made for another policy."""


class FinishedWork(QvlaError):
    """Work that took long would be replaced, which only `--force` does."""


class InvalidObservation(QvlaError):
    """An observation breaks the policy's contract."""


class MissingExtra(QvlaError, ImportError):
    """A library is needed that this installation does not have."""


def missing_extra(error: ModuleNotFoundError) -> MissingExtra | None:
    """Say which extra brings the module that was not found; None for one that none brings."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return MissingExtra(
        f"this command or call needs {package}: pip install 'qvla[{EXTRAS[package]}]'"
    )

"""Libraries that only some installations have, and the extra that brings each."""

from qvla_export.shared.errors import QvlaError

# Top-level package -> extra of the distribution `qvla`.
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "onnx", "onnx_ir", "onnxscript"), "host"),
    **dict.fromkeys(("scipy", "matplotlib", "jinja2", "pyarrow", "ml_dtypes", "h5py"), "host"),
    **dict.fromkeys(("mujoco", "metaworld", "gymnasium", "OpenGL"), "sim"),
}


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

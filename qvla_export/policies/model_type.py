"""What a checkpoint's config.json calls itself."""

from pathlib import Path

from qvla_export.policies.adapters import model_config
from qvla_export.shared.json_documents import FOREIGN, read_json


def read_model_type(checkpoint: Path) -> str | None:
    """Return `model_type` of a folder's config.json; None if it does not say.

    Raises:
        ArtifactError: it is not JSON.
    """
    raw = read_json(model_config(checkpoint), "model configuration", FOREIGN)
    value = raw.get("model_type") if isinstance(raw, dict) else None
    return value if isinstance(value, str) else None

"""The noun `HeldOutActions`: what a bundle's engine and the float policy answered."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.artifacts import require_fields
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.tensor_files import TensorArtifact, Tensors, read_tensor_file

_FORMAT = "qvla-held-out-actions-1"
_DIGESTS = ("bundle_digest", "calibration_digest", "runtime")


@dataclass(frozen=True)
class HeldOutActions(TensorArtifact):
    """Actions on the held-out observations, in their order, before un-normalization."""

    # Of the bundle, and of the observations.
    bundle_digest: str
    calibration_digest: str
    # What ran the bundle.
    runtime: str
    # The bundle's engine's, and the float policy's in torch.  float32 [n, horizon, dim]
    engine: NDArray[np.float32]
    full_precision: NDArray[np.float32]

    def __repr__(self) -> str:
        return f"<HeldOutActions of bundle {self.bundle_digest[:16]} on {len(self.engine)}>"

    def made_from(self, bundle_digest: str, calibration_digest: str, runtime: str) -> bool:
        """Whether they are of this bundle, these observations and this runtime."""
        own = (self.bundle_digest, self.calibration_digest, self.runtime)
        return own == (bundle_digest, calibration_digest, runtime)

    def _tensors(self) -> Tensors:
        return {"engine": self.engine, "full_precision": self.full_precision}

    def _provenance(self) -> Mapping[str, Any]:
        return {"format": _FORMAT, **{name: getattr(self, name) for name in _DIGESTS}}

    @staticmethod
    def load(path: Path) -> "HeldOutActions":
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        tensors, value = read_tensor_file(path, _FORMAT, "held-out actions")
        require_fields(value, _DIGESTS, f"held-out actions {path}")
        try:
            pair = (np.array(tensors["engine"]), np.array(tensors["full_precision"]))
        except KeyError as error:
            raise ArtifactError(f"held-out actions {path} lack {error}; make them anew") from None
        if pair[0].ndim != 3 or pair[0].shape != pair[1].shape:
            shapes = [list(actions.shape) for actions in pair]
            raise ArtifactError(f"held-out actions {path} have shapes {shapes}; make them anew")
        bundle, calibration, runtime = (str(value[name]) for name in _DIGESTS)
        return HeldOutActions(bundle, calibration, runtime, *pair)

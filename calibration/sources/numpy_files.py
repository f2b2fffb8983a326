"""Arrays of .npy and .npz files of unknown origin: within bounds, and never pickled objects."""

import math
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.git_lfs import refuse_pointer

_MOST_BYTES = 256 << 20
_MOST_MEMBERS = 10_000
# What numpy and zipfile raise over damaged bytes; encrypted archives are a RuntimeError.
_DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    OverflowError,
    MemoryError,
    SyntaxError,
    AttributeError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)


def read_npy(path: Path) -> NDArray[Any]:
    """Return the array of a .npy file.

    Raises:
        ArtifactError: it is missing, damaged, too large or holds pickled objects.
    """
    try:
        with path.open("rb") as file:
            return _array(file)
    except FileNotFoundError:
        raise ArtifactError(f"a file of the dataset is missing: {path}") from None
    except _DAMAGED as error:
        raise _damage(path, error) from None


def npz_members(path: Path) -> list[str]:
    """Return the names of a .npz file's arrays.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) > _MOST_MEMBERS:
                raise ValueError(f"{len(names)} members, at most {_MOST_MEMBERS} are read")
            return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]
    except FileNotFoundError:
        raise ArtifactError(f"a file of the dataset is missing: {path}") from None
    except _DAMAGED as error:
        raise _damage(path, error) from None


def read_npz(path: Path, name: str) -> NDArray[Any]:
    """Return one array of a .npz file.

    Raises:
        ArtifactError: it is missing, damaged, too large or holds pickled objects.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            return _array(file)
    except FileNotFoundError:
        raise ArtifactError(f"a file of the dataset is missing: {path}") from None
    except KeyError:
        present = ", ".join(npz_members(path))
        raise ArtifactError(f"{path} holds no array {name}; it has {present}") from None
    except _DAMAGED as error:
        raise _damage(path, error) from None


def _array(file: IO[bytes]) -> NDArray[Any]:
    version = np.lib.format.read_magic(file)
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in headers:
        raise ValueError(f"a .npy file of version {version}, 1.0 and 2.0 are read")
    with warnings.catch_warnings():
        # Of names of types that went out of use; what they mean is read or refused.
        warnings.simplefilter("ignore")
        shape, fortran, dtype = headers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never loaded")
    count = math.prod(int(side) for side in shape)
    size = count * dtype.itemsize
    if min(shape, default=0) < 0 or size > _MOST_BYTES:
        raise ValueError(f"an array {list(shape)} of {size:,} bytes, at most {_MOST_BYTES:,}")
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{len(data):,} bytes where {size:,} are announced")
    return np.frombuffer(data, dtype, count).reshape(shape, order="F" if fortran else "C")


def _damage(path: Path, error: Exception) -> ArtifactError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    refuse_pointer(path)
    return ArtifactError(f"{path} cannot be read: {reason}; copy the file again")

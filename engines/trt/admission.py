"""Every check that an engine must pass before its native code is loaded."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import EngineError
from engines.trt.gpu import Gpu
from engines.trt.modules import TrtModule
from engines.trt.seal import UnsealedEngine
from engines.trt.sidecar import REMEDY, Sidecar, engine_path, sidecar_path
from qvla_export.shared.artifacts import require_same
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.part import Part


def admit_sidecar(bundle: Bundle, part: Part, folder: Path) -> Sidecar:
    """Return what this machine stated about a part's engine when it built it.

    Raises:
        EngineError: there is no engine.
        UnsealedEngine: the statement was not made here.
        ArtifactMismatch: the engine is of another bundle.
    """
    path = sidecar_path(folder, part.name)
    if not (path.is_file() and engine_path(folder, part.name).is_file()):
        raise EngineError(
            f"there is no engine of part {part.name!r} in {folder}; build it on this machine: "
            f"qvla build {bundle.path}"
        )
    sidecar = Sidecar.load(path)
    remedy = f"Build it again: qvla build {bundle.path}."
    require_same("bundle and engine", bundle.digest, sidecar.origin.bundle_digest, remedy)
    require_same("part and engine", part.name, sidecar.origin.part, remedy)
    return sidecar


def admit_engine(path: Path, sidecar: Sidecar) -> bytes:
    """Return an engine's bytes, whose digest its sidecar states; these bytes are to be loaded.

    Raises:
        UnsealedEngine: they are other bytes.
    """
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sidecar.engine_sha256:
        raise UnsealedEngine(
            f"{path} is not the engine that was built here: expected SHA-256 "
            f"{sidecar.engine_sha256}, found {found}; {REMEDY}"
        )
    return data


def require_version(sidecar: Sidecar, module: TrtModule) -> None:
    """Refuse an engine of another TensorRT: versions do not read each other's engines."""
    made_by = f"{sidecar.origin.module} {sidecar.origin.module_version}"
    if made_by != f"{module.name} {module.version}":
        raise EngineError(
            f"the engine of part {sidecar.origin.part!r} was built by {made_by}, this is "
            f"{module.name} {module.version}; {REMEDY}"
        )


def require_gpu(sidecar: Sidecar, gpu: Gpu) -> None:
    """Refuse an engine of another compute capability, or tuned on another GPU."""
    origin = sidecar.origin
    wanted = (origin.compute_capability, origin.gpu or gpu.name)
    if wanted != (gpu.compute_capability, gpu.name):
        raise EngineError(
            f"the engine of part {origin.part!r} is for {wanted[0]} ({origin.gpu or 'any'}), the "
            f"GPU here is {gpu.name} ({gpu.compute_capability}); {REMEDY}, from a bundle whose "
            "target has this GPU"
        )


def require_tensors(part: Part, engine: Any, api: Any, path: Path) -> None:
    """Refuse a loaded engine whose inputs and outputs are not the part's."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    found = {name: np.dtype(api.nptype(engine.get_tensor_dtype(name))).name for name in names}
    wanted = {spec.name: spec.dtype for spec in (*part.inputs, *part.outputs)}
    if found != wanted:
        raise EngineError(f"{path} has tensors {found}, the bundle's part has {wanted}; {REMEDY}")

"""The Python modules `tensorrt` (10.3 to 11.4) and `tensorrt_rtx`: one API, few differences."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.base import EngineError
from engines.trt.gpu import Gpu
from qvla_export.shared.target import Target

_CONDITION = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*)\s*")


class BuildError(EngineError):
    """An engine cannot be built here, or not from this graph; the message says what to do."""


@dataclass(frozen=True)
class Traits:
    """Where the two modules differ; everything else is written once."""

    # Builds without a GPU, for the compute capability it is told; otherwise on the device only,
    # because the builder times kernels there.
    ahead_of_time: bool
    # Whether a timing cache does anything. TensorRT for RTX keeps the calls, but they are no-ops
    # since 1.2, and asking for one makes older versions look for a GPU.
    timing_cache: bool
    # How to install it.
    install: str


TRAITS: Mapping[str, Traits] = {
    "tensorrt": Traits(
        ahead_of_time=False,
        timing_cache=True,
        install="it comes with JetPack (apt install python3-libnvinfer)",
    ),
    "tensorrt_rtx": Traits(
        ahead_of_time=True, timing_cache=False, install="pip install 'qvla[rtx]'"
    ),
}


@dataclass(frozen=True)
class TrtModule:
    """An imported module that builds and runs a target's engines."""

    # "tensorrt" or "tensorrt_rtx".
    name: str
    version: str
    traits: Traits
    # The module itself.
    api: Any


def is_tensorrt(target: Target) -> bool:
    """Say whether a target's engines are built by TensorRT or TensorRT for RTX."""
    return target.runtime in TRAITS


def load_module(target: Target) -> TrtModule:
    """Import the module of a target.

    Raises:
        BuildError: the target has no engines to build, or its module is missing or too old.
    """
    if not is_tensorrt(target):
        raise BuildError(
            f"target {target.name!r} runs the bundle itself with {target.runtime}; only "
            f"targets of {sorted(TRAITS)} have engines to build"
        )
    traits = TRAITS[target.runtime]
    try:
        api = importlib.import_module(target.runtime)
    except ImportError as error:
        raise BuildError(_missing_error(target, traits, f"{target.runtime} ({error})")) from error
    if not admits(target.runtime_versions, api.__version__):
        raise BuildError(
            f"target {target.name!r} needs {target.runtime} {target.runtime_versions}, "
            f"installed is {api.__version__}; {traits.install}"
        )
    return TrtModule(target.runtime, api.__version__, traits, api)


def require_device(target: Target, module: TrtModule, gpu: Gpu | None) -> None:
    """Refuse to build where the result could not run.

    Raises:
        BuildError: the module times kernels on the device, and there is none or another one.
    """
    if module.traits.ahead_of_time:
        return
    if gpu is None:
        raise BuildError(_missing_error(target, module.traits, "an NVIDIA GPU"))
    if gpu.compute_capability != target.compute_capability:
        found = f"the GPU it is for (found {gpu.name}, {gpu.compute_capability})"
        raise BuildError(_missing_error(target, module.traits, found))


def admits(specifier: str, version: str) -> bool:
    """Say whether a version satisfies a specifier such as ">=10.3,<10.8".

    Only dotted numbers are compared, padded with zeros; "10.3.0.26+cuda12" is 10.3.0.26.

    Raises:
        ValueError: the specifier or version is not of this form.
    """
    start = re.match(r"\d+(\.\d+)*", version)
    if start is None:
        raise ValueError(f"a version must start with a number, got {version!r}")
    return all(_holds(condition, start[0]) for condition in specifier.split(","))


def _holds(condition: str, version: str) -> bool:
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise ValueError(f"a condition must be like '>=10.3', got {condition!r}")
    operator, bound = match[1], match[2]
    length = max(version.count("."), bound.count(".")) + 1
    left, right = (
        [*map(int, text.split(".")), *[0] * (length - 1 - text.count("."))]
        for text in (version, bound)
    )
    return {
        ">=": left >= right,
        "<=": left <= right,
        "==": left == right,
        "!=": left != right,
        ">": left > right,
        "<": left < right,
    }[operator]


def _missing_error(target: Target, traits: Traits, what: str) -> str:
    if traits.ahead_of_time:
        return f"target {target.name!r} needs {what}, not found here; {traits.install}"
    return (
        f"engines for target {target.name!r} are built on the device itself, by "
        f"{target.runtime} {target.runtime_versions} with its {target.compute_capability} GPU; "
        f"this machine lacks {what}. Copy the bundle to the device and run there: "
        f"qvla build BUNDLE ({traits.install})"
    )

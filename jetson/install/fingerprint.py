"""Name what engines were built and checked on: a change of it has them built or checked anew."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from engines.trt.gpu import find_gpu, read_power_mode
from jetson.board.software import read_l4t, read_tensorrt
from jetson.install.store_state import read_boot_id

# What turns an engine's numbers into actions beside the runtimes of `machine_facts`.
_PACKAGES = ("qvla", "numpy", "tokenizers", "cuda-bindings", "pycuda")


def machine_facts() -> dict[str, str]:
    """Return what an engine depends on beside its bundle: GPU, runtimes, power mode."""
    gpu = find_gpu()
    facts = {
        "architecture": platform.machine(),
        "gpu": "" if gpu is None else f"{gpu.name} {gpu.compute_capability}",
        "l4t": read_l4t(Path("/")),
        "tensorrt": read_tensorrt(Path("/")),
        "power_mode": read_power_mode() or "",
    }
    return {**facts, **_versions(("onnxruntime", "onnxruntime-gpu"))}


def runtime_facts() -> dict[str, str]:
    """Return what a check depends on and engines do not: Python and the packages beside it."""
    return {"python": platform.python_version(), **_versions(_PACKAGES)}


def machine_fingerprint() -> str:
    """Return sixteen hex digits of the machine's facts, a point and eight of the runtime's."""
    return f"{_digits(machine_facts())[:16]}.{_digits(runtime_facts())[:8]}"


def engines_part(fingerprint: str) -> str:
    """Return the part of a fingerprint that engines depend on: another runtime keeps them."""
    return fingerprint.partition(".")[0]


def _versions(names: Iterable[str]) -> dict[str, str]:
    versions = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _digits(facts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def this_machine() -> tuple[str, str]:
    """Return the fingerprint of this machine and what names this start of it."""
    return machine_fingerprint(), read_boot_id()

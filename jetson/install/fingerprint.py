"""Name the machine that engines were built and checked on: what a change of makes them anew."""

import hashlib
import importlib.metadata
import json
import platform
from contextlib import suppress
from pathlib import Path

from engines.trt.gpu import find_gpu, read_power_mode
from jetson.board.software import read_l4t, read_tensorrt
from jetson.install.store_state import read_boot_id


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
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    return facts


def machine_fingerprint() -> str:
    """Return sixteen hex digits that change with any of the machine's facts."""
    text = json.dumps(machine_facts(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def this_machine() -> tuple[str, str]:
    """Return the fingerprint of this machine and what names this start of it."""
    return machine_fingerprint(), read_boot_id()

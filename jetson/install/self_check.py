"""Build a release's engines, and run them on its golden observations, in a process of their own.

    python -m jetson.install.self_check build BUNDLE ENGINES
    python -m jetson.install.self_check check BUNDLE ENGINES SAMPLES

An engine that crashes, or takes the memory of the machine, ends this process and nothing else. The
last line on stdout is JSON.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from engines.load import load_engine
from engines.targets import find_target
from engines.verify import judge
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.latency_statistics import percentile

_TENSORRT = ("tensorrt", "tensorrt_rtx")
_WARMUP = 3


def needs_engines(target: str) -> bool:
    """Return whether a target's bundles are built on the machine; the others run as they are."""
    return find_target(target).runtime in _TENSORRT


def build(bundle: Bundle, engines: Path) -> dict[str, Any]:
    """Build a bundle's engines where they are not up to date; return their bytes by part."""
    from engines.trt.builder import build_engines

    built = build_engines(bundle, engines)
    return {sidecar.origin.part: sidecar.engine_bytes for sidecar in built}


def check(bundle: Bundle, engines: Path, samples: int) -> dict[str, Any]:
    """Return how far a bundle's engine is off on its golden observations, and how long it takes."""
    folder = engines if needs_engines(bundle.target) else None
    with load_engine(bundle, weights="tuned", engines=folder) as engine:
        verdict = judge(bundle, engine)
        feeds = bundle.golden().feeds
        times_ms = []
        for i in range(_WARMUP + samples):
            start_s = time.perf_counter()
            engine.infer(feeds[i % len(feeds)])
            times_ms.append((time.perf_counter() - start_s) * 1e3)
    timed_ms = np.asarray(times_ms[_WARMUP:])
    return {
        "bundle_digest": bundle.digest,
        "runtime": verdict.engine.runtime,
        "drift": verdict.drift.worst,
        "observations": verdict.drift.observations,
        "breaches": list(verdict.breaches),
        "samples": samples,
        "p50_ms": percentile(timed_ms, 50),
        "p95_ms": percentile(timed_ms, 95),
    }


def main(arguments: list[str]) -> int:
    """Do what the arguments say; return the exit status."""
    task, folder, engines = arguments[0], Path(arguments[1]), Path(arguments[2])
    try:
        bundle = Bundle.load(folder)
        if task == "build":
            result = build(bundle, engines)
        else:
            result = check(bundle, engines, int(arguments[3]))
    except QvlaError as error:
        result = {"error": str(error)}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

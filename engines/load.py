"""Choose and load the engine of a bundle's target."""

from typing import Literal

from engines.base import Engine, EngineError
from engines.targets import find_target
from qvla_export.bundle import Bundle


def load_engine(
    bundle: Bundle,
    threads: int | None = None,
    weights: Literal["packed", "unpacked"] = "packed",
) -> Engine:
    """Return an engine that runs a bundle on this machine.

    Args:
        bundle: verified by `Bundle.load`.
        threads: CPU threads of one operator; None for one a physical core.
        weights: "packed" computes with the stored codes; "unpacked" makes them float32 at load,
            which takes a float policy's memory and can be faster.

    Raises:
        UnknownTarget: the bundle is for a target this version does not know.
        EngineError: the runtime is not installed or refuses the graph.
    """
    target = find_target(bundle.target)
    if target.runtime != "ort":
        raise EngineError(f"no engine for runtime {target.runtime!r} of target {target.name!r}")
    try:
        from engines.ort import OrtEngine  # only the runtime of this target need be installed
    except ImportError as error:
        raise EngineError(
            f"target {target.name!r} needs onnxruntime ({error}); pip install onnxruntime"
        ) from error
    return OrtEngine(bundle, threads, weights)

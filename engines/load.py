"""Choose and load the engine of a bundle's target."""

from pathlib import Path
from typing import Literal

from engines.base import Engine, EngineError
from engines.targets import find_target
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.target import Runtime, Target


def load_engine(
    bundle: Bundle,
    threads: int | None = None,
    weights: Literal["packed", "unpacked"] = "packed",
    runtime: Runtime | None = None,
    engines: Path | None = None,
    keep_loaded: bool = True,
) -> Engine:
    """Return an engine that runs a bundle on this machine.

    Args:
        bundle: verified by `Bundle.load`.
        threads: CPU threads of one operator; None for one a physical core.
        weights: "packed" computes with the stored codes; "unpacked" makes them float32 at load,
            which takes a float policy's memory and can be faster.
        runtime: None for the target's own; "ort" runs any bundle on a CPU, to check its graphs
            where the device is not.
        engines: folder of built TensorRT engines; None for the one beside the bundle.
        keep_loaded: False holds one part at a time in memory, on ONNX Runtime; see `OrtEngine`.

    Raises:
        UnknownTarget: the bundle is for a target this version does not know.
        EngineError: the runtime is not installed, refuses the graph, or has no engine yet.
    """
    target = find_target(bundle.target)
    runtime = runtime or target.runtime
    if runtime in ("tensorrt", "tensorrt_rtx"):
        if runtime != target.runtime:
            raise EngineError(
                f"a bundle for target {target.name!r} runs on {target.runtime} or, to check it, "
                f"on ort; not on {runtime}"
            )
        from engines.trt.engine import TensorRtEngine

        return TensorRtEngine(bundle, engines)
    return _load_ort(bundle, target, threads, weights, runtime, keep_loaded)


def runtime_here(target: Target) -> Runtime:
    """Return the target's own runtime if this machine can run its engines, else "ort".

    ONNX Runtime on a CPU then executes the target's graphs: what they compute can be judged, not
    how long they take.
    """
    if target.runtime in ("tensorrt", "tensorrt_rtx"):
        from engines.trt.gpu import find_gpu

        gpu = find_gpu()
        same = gpu is not None and gpu.compute_capability == target.compute_capability
        return target.runtime if same else "ort"
    if target.runtime == "ort-cuda":
        import onnxruntime

        has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        return "ort-cuda" if has_cuda else "ort"
    return target.runtime


def _load_ort(
    bundle: Bundle,
    target: Target,
    threads: int | None,
    weights: Literal["packed", "unpacked"],
    runtime: Runtime,
    keep_loaded: bool,
) -> Engine:
    try:
        from engines.ort import OrtEngine  # only the runtime of this target need be installed
    except ImportError as error:
        package = "onnxruntime-gpu" if runtime == "ort-cuda" else "onnxruntime"
        raise EngineError(
            f"target {target.name!r} needs onnxruntime ({error}); pip install {package}"
        ) from error
    if runtime == "ort" and target.runtime != "ort":
        # Only checked here: operators as the graph has them. ONNX Runtime 1.32's own integer
        # products refuse TensorRT's signed activations behind a Reshape.
        weights = "unpacked"
    provider: Literal["CUDAExecutionProvider", "CPUExecutionProvider"] = (
        "CUDAExecutionProvider" if runtime == "ort-cuda" else "CPUExecutionProvider"
    )
    return OrtEngine(bundle, threads, weights, keep_loaded, provider)

"""Choose and load the engine of a bundle's target."""

import logging
from importlib import import_module
from pathlib import Path
from typing import Literal

from engines.base import Engine, EngineError
from engines.targets import find_target
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.target import Runtime, Target, WeightForm

_LOGGER = logging.getLogger(__name__)


def load_engine(
    bundle: Bundle,
    threads: int | None = None,
    weights: WeightForm = "packed",
    runtime: Runtime | None = None,
    engines: Path | None = None,
    keep_loaded: bool = True,
) -> Engine:
    """Return an engine that runs a bundle on this machine.

    Args:
        bundle: verified by `Bundle.load`.
        threads: CPU threads of one operator; None for one a physical core.
        weights: "packed" computes with the stored codes; "unpacked" makes them float32 at load,
            which takes a float policy's memory and can be faster; "tuned" is what `qvla tune`
            chose here, runtime included, and packed where nothing was.
        runtime: None for the target's own; "ort" runs any bundle on a CPU, to check its graphs
            where the device is not; "openvino" runs those of target `cpu`; "torch"
            walks any bundle's graphs on a GPU or a CPU.
        engines: folder of built TensorRT engines; None for the one beside the bundle.
        keep_loaded: False holds one part at a time in memory, on ONNX Runtime; see `OrtEngine`.

    Raises:
        UnknownTarget: the bundle is for a target this version does not know.
        EngineError: the runtime is not installed, refuses the graph, or has no engine yet.
    """
    target = find_target(bundle.target)
    own, runtime = runtime, runtime or target.runtime
    if runtime == "torch":
        return _load_torch(bundle, weights)
    if runtime in ("tensorrt", "tensorrt_rtx"):
        if runtime != target.runtime:
            raise EngineError(
                f"a bundle for target {target.name!r} runs on {target.runtime} or, to check it, "
                f"on ort; not on {runtime}"
            )
        from engines.trt.engine import TensorRtEngine

        return TensorRtEngine(bundle, engines)
    if weights == "tuned":
        tuned = _load_tuned(bundle, target, threads, own, keep_loaded)
        if tuned is not None:
            return tuned
        weights = "packed"
    if runtime == "openvino":
        return _load_openvino(bundle, target, threads, weights, keep_loaded)
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


def _load_tuned(
    bundle: Bundle,
    target: Target,
    threads: int | None,
    runtime: Runtime | None,
    keep_loaded: bool,
) -> Engine | None:
    """Return the engine that `qvla tune` chose here; None where it chose none of this runtime."""
    if target.runtime != "ort":
        return None
    try:
        from engines.forms.candidates import Candidate
        from engines.forms.tuning import find_tuning
    except ImportError:  # the runtime's own branch says which
        return None
    tuning = find_tuning(bundle, threads)
    if tuning is None or runtime not in (None, tuning.runtime):
        return None
    _LOGGER.info("weights as qvla tune chose: %s", tuning.form)
    chosen = Candidate(tuning.runtime, "tuned", tuning.float_layers)
    return chosen.open(bundle, threads, keep_loaded)


def _load_openvino(
    bundle: Bundle,
    target: Target,
    threads: int | None,
    weights: Literal["packed", "unpacked"],
    keep_loaded: bool,
) -> Engine:
    if target.runtime != "ort":
        raise EngineError(
            f"OpenVINO runs bundles for target cpu, this one is for {target.name!r}; "
            "export it with --target cpu, or check it with --runtime ort"
        )
    try:
        from engines.openvino import OpenVinoEngine
    except ImportError as error:
        raise EngineError(
            f"OpenVINO is not installed ({error}); pip install 'qvla[openvino]'"
        ) from error
    from engines.forms.float_layers import all_layers

    float_layers = all_layers(bundle) if weights == "unpacked" else {}
    return OpenVinoEngine(bundle, threads, keep_loaded, float_layers)


def _load_torch(bundle: Bundle, weights: WeightForm) -> Engine:
    try:
        # By its name: nothing else of the robot side reaches torch.
        module = import_module("engines.torch.torch_engine")
    except ImportError as error:
        raise EngineError(
            f"the torch engine needs torch and onnx ({error}); pip install 'qvla[host,triton]'"
        ) from error
    engine: Engine = module.TorchEngine(bundle, tiled=False if weights == "unpacked" else None)
    return engine


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

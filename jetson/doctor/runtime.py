"""Python, ONNX Runtime, TensorRT, GPU: whether the bundle's runtime is here, and its engines'."""

from engines.base import EngineError
from engines.targets import TARGETS
from engines.trt.admission import require_gpu, require_version
from engines.trt.gpu import DRIVER
from engines.trt.modules import TRAITS, admits
from jetson.doctor.bundle_facts import NO_ORIN, BundleFacts
from jetson.doctor.finding import BoardFinding, Check
from jetson.doctor.machine import Machine
from qvla_export.shared.target import Target

NO_BUNDLE = "no bundle given"
# Jetson Linux -> the Python that JetPack's modules are for. JetPack 5's 3.8 is too old for us.
_JETPACK_PYTHONS = {"36": (3, 10), "38": (3, 12), "39": (3, 12)}
_PYTHON = Check("Python", "runtimes are published for some versions of Python only")
_ORT = Check("ONNX Runtime", "older versions cannot read the bundle's operators")
_TENSORRT = Check("TensorRT", "engines are built and run by the target's own versions only")
_BINDINGS = Check("CUDA bindings", "engines reach the GPU's memory through them", "cuda-bindings")
_GPU = Check("GPU", "a bundle's kernels exist for its target's GPU only")
_ENGINES = Check("engines", "an engine loads only where it was built", "built here")
_ENGINE_VERSION = Check("engines' TensorRT", "versions do not read each other's engines")
_ENGINE_GPU = Check("engines' GPU", "an engine holds kernels for one GPU")
_ORT_NAMES = ("onnxruntime", "onnxruntime-gpu")


def check_python(machine: Machine, facts: BundleFacts | None) -> BoardFinding:
    """Look whether this Python is one that the bundle's runtime is published for."""
    found = _version_text(machine.python)
    target = None if facts is None else facts.target
    if facts is None or target is None or facts.module is not None:
        return _PYTHON.ok(found)
    if facts.is_for_another(machine.board):
        return _PYTHON.ok(found)
    wanted = _JETPACK_PYTHONS.get(machine.board.l4t.partition(".")[0])
    if target.runtime == "tensorrt" and wanted is not None and machine.python != wanted:
        name = f"python{_version_text(wanted)}"
        return _PYTHON.error(
            found,
            f"sudo apt install {name}-venv && {name} -m venv --system-site-packages .venv && "
            ".venv/bin/pip install qvla-*.whl",
            wanted=f"{_version_text(wanted)}, JetPack's",
        )
    if target.runtime == "ort" and machine.python < (3, 11):
        # ONNX Runtime 1.23 is the last one for 3.10.
        return _PYTHON.error(
            found,
            "sudo apt install python3.11-venv && python3.11 -m venv .venv && "
            ".venv/bin/pip install qvla-*.whl",
            wanted=f">=3.11: ONNX Runtime {target.runtime_versions}",
        )
    return _PYTHON.ok(found)


def check_onnx_runtime(machine: Machine, facts: BundleFacts | None) -> BoardFinding:
    """Look whether ONNX Runtime is here and reads the bundle's operator set."""
    found = {n: machine.packages[n] for n in _ORT_NAMES if n in machine.packages}
    shown = ", ".join(f"{name} {version}" for name, version in found.items()) or "not installed"
    target = None if facts is None else facts.target
    if target is None or target.runtime not in ("ort", "ort-cuda"):
        return _ORT.inapplicable(f"{_no_engine(facts)}; {shown}")
    name = "onnxruntime-gpu" if target.runtime == "ort-cuda" else "onnxruntime"
    version = found.get(name) or found.get("onnxruntime-gpu")
    if version is not None and _admits(target.runtime_versions, version):
        return _ORT.ok(shown)
    wanted = f"{target.runtime_versions} for opset {target.opset}"
    return _ORT.error(shown, f"pip install '{name}{target.runtime_versions}'", wanted)


def check_tensorrt(machine: Machine, facts: BundleFacts | None) -> BoardFinding:
    """Look whether the target's TensorRT can be imported and is a version it admits."""
    target = None if facts is None else facts.target
    if facts is None or target is None or not facts.is_tensorrt:
        shown = machine.board.tensorrt or "not installed"
        return _TENSORRT.inapplicable(f"{_no_engine(facts)}; {shown}")
    if facts.is_for_another(machine.board):
        return _TENSORRT.inapplicable(NO_ORIN)
    if facts.module is not None:
        return _TENSORRT.ok(f"{facts.module.name} {facts.module.version}")
    wanted = f"{target.runtime} {target.runtime_versions}"
    return _TENSORRT.error(facts.module_problem, _tensorrt_remedy(machine, target), wanted)


def _tensorrt_remedy(machine: Machine, target: Target) -> str:
    installed = machine.board.tensorrt.split(" ")[0]
    if target.runtime == "tensorrt" and installed:
        others = [
            other.name
            for other in TARGETS.values()
            if other.runtime == target.runtime
            and other.compute_capability == target.compute_capability
            and _admits(other.runtime_versions, installed)
        ]
        if target.name in others:
            # Installed, and yet the module is not found: an environment that hides it.
            return (
                "sudo apt install python3-libnvinfer; in an environment of your own: "
                "python3 -m venv --system-site-packages .venv"
            )
        if others:
            return f"on the host, make the bundle for it: qvla deploy --target {others[0]}"
        return (
            "flash a JetPack that has it, from a host's Linux_for_Tegra folder: "
            "sudo ./tools/kernel_flash/l4t_initrd_flash.sh BOARD internal"
        )
    if target.runtime == "tensorrt":
        return "sudo apt update && sudo apt install nvidia-jetpack python3-libnvinfer"
    return TRAITS[target.runtime].install


def check_bindings(machine: Machine, facts: BundleFacts | None) -> BoardFinding:
    """Look for what copies tensors to the GPU."""
    if facts is None or not facts.is_tensorrt:
        return _BINDINGS.inapplicable(_no_engine(facts))
    if facts.is_for_another(machine.board):
        return _BINDINGS.inapplicable(NO_ORIN)
    for package in ("cuda-bindings", "pycuda"):
        if (version := machine.packages.get(package)) is not None:
            return _BINDINGS.ok(f"{package} {version}")
    return _BINDINGS.error("not installed", "pip install 'cuda-bindings<13'")


def check_gpu(machine: Machine, facts: BundleFacts | None) -> BoardFinding:
    """Look whether the driver offers the target's GPU."""
    gpu, target = machine.gpu, None if facts is None else facts.target
    shown = "no NVIDIA GPU" if gpu is None else f"{gpu.name}, {gpu.compute_capability}"
    if facts is None or target is None or target.runtime == "ort":
        return _GPU.inapplicable(f"{_no_engine(facts)}; {shown}")
    if facts.is_for_another(machine.board):
        path = facts.shell_path
        return _GPU.error(
            shown,
            f"{NO_ORIN}: copy the bundle there: rsync -a --checksum --delete {path}/ ORIN:bundle/ "
            "&& ssh ORIN qvla doctor bundle",
            f"an Orin with JetPack, for target {target.name}",
        )
    wanted = target.compute_capability or "an NVIDIA GPU"
    if gpu is None:
        install = (
            "copy the bundle to a machine that has one; if lspci lists one here, install its "
            "driver: sudo ubuntu-drivers install"
        )
        if machine.board.is_jetson:
            install = "sudo apt install nvidia-jetpack; in a container: --runtime nvidia --gpus all"
        return _GPU.error(f"{DRIVER} offers no GPU", install, wanted)
    if target.compute_capability not in (None, gpu.compute_capability):
        others = [
            t.name for t in TARGETS.values() if t.compute_capability == gpu.compute_capability
        ]
        other = others[0] if others else "cpu"
        return _GPU.error(
            shown, f"on the host, make a bundle for this GPU: qvla deploy --target {other}", wanted
        )
    return _GPU.ok(shown)


def check_engines(machine: Machine, facts: BundleFacts | None) -> BoardFinding:
    """Look whether every part's engine is there, whole, of this bundle and built here."""
    if facts is None or not facts.is_tensorrt:
        return _ENGINES.inapplicable(_no_engine(facts))
    if facts.is_for_another(machine.board):
        return _ENGINES.inapplicable(f"{NO_ORIN}; engines are built there")
    problems = [part for part in facts.parts if part.sidecar is None]
    if not problems:
        return _ENGINES.ok(f"{len(facts.parts)} built here, in {facts.engines}")
    more = f" (and {len(problems) - 1} more parts)" if len(problems) > 1 else ""
    return _ENGINES.error(problems[0].problem + more, facts.build_command)


def check_engine_version(machine: Machine, facts: BundleFacts | None) -> BoardFinding:
    """Look whether the engines were built by the TensorRT that is installed."""
    if facts is None or not facts.is_tensorrt:
        return _ENGINE_VERSION.inapplicable(_no_engine(facts))
    if facts.is_for_another(machine.board):
        return _ENGINE_VERSION.inapplicable(NO_ORIN)
    sidecars = [part.sidecar for part in facts.parts if part.sidecar is not None]
    if not sidecars or facts.module is None:
        return _ENGINE_VERSION.inapplicable("no engines, or no TensorRT, to compare")
    here = f"{facts.module.name} {facts.module.version}"
    try:
        for sidecar in sidecars:
            require_version(sidecar, facts.module)
    except EngineError:
        origin = sidecar.origin
        return _ENGINE_VERSION.error(
            f"{origin.module} {origin.module_version}", facts.build_command, wanted=here
        )
    return _ENGINE_VERSION.ok(here)


def check_engine_gpu(machine: Machine, facts: BundleFacts | None) -> BoardFinding:
    """Look whether the engines were built for the GPU that is here."""
    if facts is None or not facts.is_tensorrt:
        return _ENGINE_GPU.inapplicable(_no_engine(facts))
    if facts.is_for_another(machine.board):
        return _ENGINE_GPU.inapplicable(NO_ORIN)
    sidecars = [part.sidecar for part in facts.parts if part.sidecar is not None]
    if not sidecars or machine.gpu is None:
        return _ENGINE_GPU.inapplicable("no engines, or no GPU, to compare")
    here = f"{machine.gpu.name} ({machine.gpu.compute_capability})"
    try:
        for sidecar in sidecars:
            require_gpu(sidecar, machine.gpu)
    except EngineError:
        origin = sidecar.origin
        built_for = f"{origin.gpu or 'any'} ({origin.compute_capability})"
        return _ENGINE_GPU.error(built_for, facts.build_command, wanted=here)
    return _ENGINE_GPU.ok(here)


def _no_engine(facts: BundleFacts | None) -> str:
    """Return why there is nothing to look at."""
    if facts is None or facts.target is None:
        return NO_BUNDLE if facts is None else "the bundle cannot be opened"
    return f"target {facts.target.name} runs on {facts.target.runtime}"


def _admits(specifier: str, version: str) -> bool:
    try:
        return admits(specifier, version)
    except ValueError:
        return False


def _version_text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"

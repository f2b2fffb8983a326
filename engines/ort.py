"""ONNX Runtime on a CPU, or on a GPU by its CUDA execution provider."""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state

from engines.base import BundleEngine, EngineError, Feeds, require_threads, rounds_activations
from engines.forms.float_layers import FloatLayers, form_of, with_float_layers
from engines.forms.graph_file import GraphFile
from engines.layer_times import LayerTime, LayerTimes
from engines.ort_layers import profiling_options, read_profile
from engines.program.ort_values import call_part, copied, to_ort
from engines.program.part_log import PartLog
from qvla_export.shared.allocator import return_freed_memory
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.part import Part
from qvla_export.shared.program import PartRuns, run_program

_ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
_UNPACK = "session.disable_quant_qdq"
# Products of u8 x u8 instead of u8 x s8.
_EXACT_INTEGERS = "session.x64quantprecision"
_ERRORS_ONLY = 3
# First passes of a profile: allocations and cold caches.
_UNTIMED_PASSES = 5
# What a session that is not made raises: a class a status of the runtime's, which share no base,
# and what C++'s own exceptions become.
_REFUSALS: tuple[type[Exception], ...] = (
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
    MemoryError,
    RuntimeError,
    ValueError,
)
_FOLDER = "session.model_external_initializers_file_folder_path"
# "packed": MatMulNBits reads the stored codes. "unpacked": codes become float32 at load; the memory
# of a float policy, and its speed where many rows make a layer compute-bound.
WholeForm = Literal["packed", "unpacked"]
Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider"]


class OrtEngine(BundleEngine):
    """A bundle's graphs on ONNX Runtime, run as its program says; see `Engine`.

    What a part puts out stays in the runtime until no part reads it any more.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        weights: WholeForm = "packed",
        keep_loaded: bool = True,
        provider: Provider = "CPUExecutionProvider",
        float_layers: FloatLayers = MappingProxyType({}),
    ) -> None:
        """Load a bundle.

        Args:
            bundle: verified by `Bundle.load`.
            threads: threads of one operator; None for one a physical core.
            weights: how quantized weights are held in memory.
            keep_loaded: False loads each part when its turn comes and frees it afterwards: one
                part's memory instead of the policy's, at the cost of loading for every call.
            provider: what computes. Operators that CUDA lacks run on the CPU.
            float_layers: those whose weights become float32 at load though others stay packed.

        Raises:
            EngineError: the runtime refuses the graph or a setting, or lacks the provider.
        """
        _require_provider(provider)
        self._provider = provider
        super().__init__(bundle)
        self._new_options = partial(session_options, bundle, threads, weights)
        self._new_options()  # refuses a wrong setting now, though a part may be loaded much later
        self._weights, self._float_layers = weights, float_layers
        self._keep_loaded = keep_loaded
        # Part name -> session.
        self._sessions: dict[str, Any] = {}
        if keep_loaded:
            self._sessions = {part.name: self._load(part) for part in bundle.parts}
            # Folded constants of a graph are several times its weights while it is loaded.
            return_freed_memory()

    @property
    def runtime(self) -> str:
        """Name, version and execution provider of the runtime."""
        return f"onnxruntime {onnxruntime.__version__} {self._provider}"

    @property
    def weight_form(self) -> str:
        """How weights are held, in words; see `BundleEngine`."""
        return form_of(self._float_layers) or self._weights

    def infer(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Return the named outputs of named inputs."""
        self._admit(feeds)
        log = PartLog()
        outputs = self._run_program(feeds, self._sessions, log)
        self._part_ms, self._part_calls = log.part_ms, log.part_calls
        return outputs

    def layer_times(self, feeds: Feeds, passes: int = 50) -> LayerTimes:
        """Run the whole bundle some times with ONNX Runtime's profiler on; see `LayerTimes`.

        Sessions of their own, with the same settings: the weights are in memory twice meanwhile.

        Raises:
            EngineError: it runs on a GPU, where ONNX Runtime's times are those of launches.
        """
        if self._provider != "CPUExecutionProvider":
            raise EngineError(
                f"layer times of {self._provider} would be those of kernel launches; take them on "
                "a TensorRT target, or with NVIDIA's nsys"
            )
        self._admit(feeds)
        runs = passes + _UNTIMED_PASSES
        rows: list[LayerTime] = []
        with tempfile.TemporaryDirectory(prefix="qvla-layers-") as folder:
            sessions = {
                part.name: self._load(
                    part, profiling_options(self._new_options(), Path(folder), part.name)
                )
                for part in self._bundle.parts
            }
            for _ in range(runs):
                self._run_program(feeds, sessions, PartLog())
            calls = self._bundle.program.calls
            for name, session in sessions.items():
                profile, count = Path(session.end_profiling()), calls[name]
                rows += read_profile(profile, name, runs, _UNTIMED_PASSES, count)
        return LayerTimes(self.runtime, tuple(rows))

    def close(self) -> None:
        """Free the sessions."""
        self._is_open = False
        self._sessions = {}

    def _run_program(
        self, feeds: Feeds, sessions: Mapping[str, Any], log: PartLog
    ) -> dict[str, NDArray[Any]]:
        """Return the bundle's outputs; a part without a session is loaded for each call."""
        parts = {part.name: part for part in self._bundle.parts}
        device = "cuda" if self._provider == "CUDAExecutionProvider" else "cpu"

        def call(run: PartRuns, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
            # Loading, where a part is not kept, is part of what the part takes.
            with log.call(run):
                if name in sessions:
                    return call_part(sessions[name], parts[name], inputs, device)
                # A runtime's tensor keeps all that its session took: copies let the session go.
                outputs = copied(call_part(self._load(parts[name]), parts[name], inputs, device))
                return_freed_memory()
                return outputs

        values = run_program(self._bundle.program, self._bundle.reads, to_ort(feeds), call)
        return {spec.name: values[spec.name].numpy() for spec in self.outputs}

    def _load(self, part: Part, options: Any = None) -> Any:
        path = self._bundle.model_path(part)
        providers = list(dict.fromkeys((self._provider, "CPUExecutionProvider")))
        options = options or self._new_options()
        layers = self._float_layers.get(part.name, ())
        try:
            session = open_session(path, options, layers, providers)
        except EngineError as error:
            raise EngineError(
                f"{error}. The bundle was made with {self._bundle.manifest['versions']}; use that "
                "version."
            ) from error
        if self._provider not in session.get_providers():
            # A provider whose libraries do not load is left out with a warning only.
            raise EngineError(
                f"{self._provider} did not start (found {session.get_providers()}); check the "
                "NVIDIA driver and that CUDA and cuDNN are those onnxruntime-gpu was built for"
            )
        return session


def open_session(
    path: Path,
    options: Any,
    float_layers: Collection[str] = (),
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Any:
    """Return a session of a graph, with some layers' weights as float32.

    Args:
        path: of the graph; its weights lie beside it.
        options: of the session alone: they learn where the weights are.
        float_layers: names as `engines.forms.float_layers.layers_of` gives them.
        providers: what computes, best first.

    Raises:
        EngineError: the file is no ONNX model, or the runtime refuses it.
    """
    model: str | bytes = str(path)
    if float_layers:
        model = with_float_layers(GraphFile.read(path), float_layers).to_bytes()
        options.add_session_config_entry(_FOLDER, str(path.parent))
    try:
        return onnxruntime.InferenceSession(model, options, providers=list(providers))
    except _REFUSALS as error:
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}"
        ) from error


def _require_provider(provider: Provider) -> None:
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise EngineError(
            f"onnxruntime {onnxruntime.__version__} here has no {provider}, only {available}; "
            "pip uninstall onnxruntime, then pip install 'qvla[gpu]'"
        )


def session_options(bundle: Bundle, threads: int | None, weights: WholeForm = "packed") -> Any:
    """Return the session options a bundle asks for.

    `accuracy_level` 0 computes with float32 activations. Without it ONNX Runtime 1.32 uses 4:
    activations rounded to 8 bits per block, about 0.5 % of a layer's largest output away.
    """
    options = ort_options(bundle.engine_options.get("accuracy_level", 0), threads, weights)
    if rounds_activations(bundle):
        keep_integers_exact(options)
    return options


def keep_integers_exact(options: Any) -> None:
    """Set options of a graph with rounded activations so that this CPU's products do not saturate.

    Not for others: ONNX Runtime 1.32 then fails on 8-bit weights of float activations, and where
    integers do not saturate the same numbers take four times as long.
    """
    if saturates(cpu_description()):
        options.add_session_config_entry(_EXACT_INTEGERS, "1")


def saturates(cpu_description: str) -> bool:
    """Say whether 8-bit products overflow 16 bits: on x86-64 without VNNI or AMX.

    Args:
        cpu_description: Linux's /proc/cpuinfo; only x86 CPUs have a line "flags" in it.
    """
    lines = (line.partition(":") for line in cpu_description.splitlines())
    flags = next((value.split() for key, _, value in lines if key.strip() == "flags"), None)
    return flags is not None and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags)


def cpu_description() -> str:
    """Return Linux's /proc/cpuinfo; nothing on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return ""


def ort_options(level: object, threads: int | None, weights: WholeForm = "packed") -> Any:
    """Return session options; `level` is the accuracy level of `session_options`."""
    require_threads(threads)
    if level not in (0, 1, 2, 3, 4):
        raise EngineError(f"accuracy_level must be 0 to 4, got {level!r}; export the bundle anew")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry(_ACCURACY_LEVEL, str(level))
    options.add_session_config_entry(_UNPACK, str(int(weights == "unpacked")))
    return options

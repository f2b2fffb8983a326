"""OpenVINO on a CPU: float graphs, and codes that expand to int8.

It reads no graph with 2- or 4-bit types. ONNX Runtime, which every robot has, computes a graph's
constants first; what OpenVINO is given holds int8 or float32 weights, and is gone once it is read.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from engines.base import BundleEngine, EngineError, Feeds, require_threads, rounds_activations
from engines.forms.float_layers import FloatLayers, all_layers, form_of
from engines.forms.folded import fold
from engines.layer_times import LayerTime, LayerTimes
from engines.openvino_graph import read_graph
from engines.ort import cpu_description, saturates
from engines.program.part_log import PartLog
from qvla_export.shared.allocator import return_freed_memory
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.part import Part
from qvla_export.shared.program import PartRuns, run_program

_UNTIMED_PASSES = 5


class OpenVinoEngine(BundleEngine):
    """A bundle's graphs on OpenVINO, run as its program says; see `Engine`.

    What a part puts out is one array, which the parts that read it share.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        keep_loaded: bool = True,
        float_layers: FloatLayers = MappingProxyType({}),
    ) -> None:
        """Load a bundle.

        Args:
            bundle: verified by `Bundle.load`, for ONNX Runtime on a CPU.
            threads: of one action; None for one a physical core.
            keep_loaded: False compiles each part when its turn comes and frees it afterwards.
            float_layers: those whose weights become float32 at load.

        Raises:
            EngineError: the runtime refuses a graph or a setting, or this CPU's products of 8-bit
                integers overflow in it.
        """
        super().__init__(bundle)
        require_threads(threads)
        _require_exact_integers(bundle, float_layers)
        self._threads = threads
        self._float_layers = float_layers
        self._core = openvino.Core()
        # Part name -> its infer request, which holds the compiled graph.
        self._requests: dict[str, Any] = {}
        if keep_loaded:
            self._requests = {part.name: self._load(part) for part in bundle.parts}
            return_freed_memory()

    @property
    def runtime(self) -> str:
        """Name, version and device of the runtime."""
        return f"openvino {openvino_version()} CPU"

    @property
    def weight_form(self) -> str:
        """How weights are held, in words; see `BundleEngine`."""
        return f"openvino, {form_of(self._float_layers) or 'expanded'}"

    def infer(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Return the named outputs of named inputs."""
        self._admit(feeds)
        log = PartLog()
        outputs = self._run_program(feeds, self._requests, log)
        self._part_ms, self._part_calls = log.part_ms, log.part_calls
        return outputs

    def layer_times(self, feeds: Feeds, passes: int = 50) -> LayerTimes:
        """Run the whole bundle some times with OpenVINO's counters on; see `LayerTimes`.

        Graphs of their own, with the same settings: the weights are in memory twice meanwhile.
        """
        self._admit(feeds)
        requests = {part.name: self._load(part, counted=True) for part in self._bundle.parts}
        taken: dict[tuple[str, str, str], list[float]] = {}
        for index in range(passes + _UNTIMED_PASSES):
            once = _OnePass(requests)
            self._run_program(feeds, requests, PartLog(), once)
            for key, ms in once.ms.items():
                if index >= _UNTIMED_PASSES:
                    taken.setdefault(key, []).append(ms)
        # What did not run in every pass is no layer's time.
        rows = [
            LayerTime.of_node(*key, np.array(ms)) for key, ms in taken.items() if len(ms) == passes
        ]
        return LayerTimes(self.runtime, tuple(rows))

    def close(self) -> None:
        """Free the compiled graphs."""
        self._is_open = False
        self._requests = {}

    def _run_program(
        self,
        feeds: Feeds,
        requests: Mapping[str, Any],
        log: PartLog,
        once: "_OnePass | None" = None,
    ) -> dict[str, NDArray[Any]]:
        parts = {part.name: part for part in self._bundle.parts}

        def call(run: PartRuns, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
            # Loading, where a part is not kept, is part of what the part takes.
            with log.call(run):
                request = requests[name] if name in requests else self._load(parts[name])
                # Outputs are copied: the request's own are overwritten when a part repeats.
                found = request.infer(inputs, share_inputs=True, share_outputs=False)
                outputs = {spec.name: np.asarray(found[spec.name]) for spec in parts[name].outputs}
                if once is not None:
                    once.count(name)
                return outputs

        values = run_program(self._bundle.program, self._bundle.reads, dict(feeds), call)
        return {spec.name: values[spec.name] for spec in self.outputs}

    def _load(self, part: Part, counted: bool = False) -> Any:
        settings = {
            **latency_settings(self._threads),
            # Where weights alone are integers, inputs stay in float, as bundles ask for.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "PERF_COUNT": counted,
        }
        path = self._bundle.model_path(part)
        with tempfile.TemporaryDirectory(prefix="qvla-openvino-") as folder:
            if self._bundle.plan is not None:
                layers = self._float_layers.get(part.name, ())
                path = fold(self._bundle, part, layers, Path(folder))
            try:
                model = read_graph(self._core, path)
                return self._core.compile_model(model, "CPU", settings).create_infer_request()
            except RuntimeError as error:
                last = str(error).strip().splitlines()[-1:]
                raise EngineError(
                    f"openvino {openvino_version()} cannot load part {part.name!r} of "
                    f"{self._bundle.path}: {last[0] if last else error}; --runtime ort runs it"
                ) from error


class _OnePass:
    """Adds up what each node of each part took in one run of the program."""

    def __init__(self, requests: Mapping[str, Any]) -> None:
        self._requests = requests
        # Part, name and kind of a node -> milliseconds.
        self.ms: dict[tuple[str, str, str], float] = {}

    def count(self, part: str) -> None:
        """Add the counters of the part that ran last."""
        for node in self._requests[part].profiling_info:
            if node.status == openvino.ProfilingInfo.Status.EXECUTED:
                key = part, node.node_name, node.node_type
                ms = node.real_time.total_seconds() * 1e3
                self.ms[key] = self.ms.get(key, 0.0) + ms


def latency_settings(threads: int | None) -> dict[str, Any]:
    """Return what OpenVINO is told for one action at a time, in float32.

    Args:
        threads: of one action; None for one a physical core.
    """
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        # Its default is bfloat16 where a CPU has it, which moves actions more than ours may.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return settings if threads is None else {**settings, "INFERENCE_NUM_THREADS": threads}


def openvino_version() -> str:
    """Return the runtime's version without its build."""
    return str(openvino.__version__).partition("-")[0]


def _require_exact_integers(bundle: Bundle, float_layers: FloatLayers) -> None:
    """Refuse products of integers where they overflow.

    OpenVINO 2026.4 multiplies u8 by s8 into 16 bits on x86-64 without VNNI or AMX. A layer of 256
    inputs was off by up to a tenth of its largest output there (AVX2, measured 2026-11).
    """
    if not rounds_activations(bundle) or not saturates(cpu_description()):
        return
    integers = [
        layer
        for part, layers in all_layers(bundle).items()
        for layer in sorted(layers)
        if layer not in float_layers.get(part, ())
    ]
    if integers:
        raise EngineError(
            f"OpenVINO's products of 8-bit integers overflow on this CPU, which has neither VNNI "
            f"nor AMX, and {len(integers)} layers would be such ({integers[0]}); run the bundle on "
            "ONNX Runtime (--runtime ort), whose products are exact, or with --weights unpacked"
        )

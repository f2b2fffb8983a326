"""torch walks a bundle's graphs: on any CUDA GPU, in one captured graph, and on the CPU."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.base import BundleEngine, EngineError, Feeds
from engines.layer_times import LayerTimes
from engines.program.part_log import PartLog
from engines.torch.gpu_clock import gpu_ms
from engines.torch.part_graph import PartGraph
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.program import PartRuns, run_program

# Passes before a capture: libraries choose their kernels and take their memory.
_WARM_UP_PASSES = 3


class TorchEngine(BundleEngine):
    """A bundle's graphs in torch, run as its program says; see `Engine`.

    Weights are unpacked when it is loaded, but those of tiles. On a GPU a whole action, its loops
    included, is captured as one CUDA graph for each set of input shapes.
    """

    def __init__(
        self, bundle: Bundle, device: str | None = None, tiled: bool | None = None
    ) -> None:
        """Load a bundle.

        Args:
            bundle: verified by `Bundle.load`.
            device: "cpu", "cuda"; None for the GPU where there is one.
            tiled: whether products with quantized weights are launches of `engines.kernels`, which
                read packed codes; None for those of a GPU where Triton is installed.

        Raises:
            EngineError: a graph holds an operator that our bundles do not; or there is no GPU.
        """
        super().__init__(bundle)
        cuda = torch.cuda.is_available()
        self._device = torch.device(device or ("cuda" if cuda else "cpu"))
        if self._device.type == "cuda" and not cuda:
            raise EngineError(
                f"torch {torch.__version__} sees no NVIDIA GPU: look with nvidia-smi, or install a "
                "torch built for CUDA"
            )
        if tiled is None:
            tiled = self._device.type == "cuda" and find_spec("triton") is not None
        self._graphs = {
            part.name: PartGraph(bundle.model_path(part), self._device, tiled)
            for part in bundle.parts
        }
        # By input shapes: what is captured, and the tensors it reads and writes.
        self._captured: dict[tuple[Any, ...], _Captured] = {}

    @property
    def runtime(self) -> str:
        """Version of torch, and the device."""
        return f"torch {torch.__version__} {self._device.type}"

    def infer(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Return the named outputs of named inputs."""
        self._admit(feeds)
        with torch.inference_mode():
            given = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in feeds.items()}
            outputs = self._on_cpu(given) if self._device.type == "cpu" else self._on_gpu(given)
        return {spec.name: outputs[spec.name].cpu().numpy() for spec in self.outputs}

    def layer_times(self, feeds: Feeds, passes: int = 50) -> LayerTimes:
        """Refuse: times of torch's operators would be those of another engine's layers.

        Raises:
            EngineError: always.
        """
        raise EngineError("layer times are taken on ONNX Runtime or TensorRT; use --runtime ort")

    def close(self) -> None:
        """Free graphs and weights."""
        self._is_open = False
        self._graphs, self._captured = {}, {}

    def _on_cpu(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        log = PartLog()
        outputs = self._run_program(feeds, log)
        self._part_ms, self._part_calls = log.part_ms, log.part_calls
        return outputs

    def _run_program(self, feeds: Mapping[str, Tensor], log: PartLog) -> dict[str, Tensor]:
        def call(run: PartRuns, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            with log.call(run):
                return self._graphs[name].run(inputs)

        return run_program(self._bundle.program, self._bundle.reads, dict(feeds), call)

    def _on_gpu(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replay the captured action; its time is that of the whole graph, by the GPU's events."""
        key = tuple((name, tuple(value.shape)) for name, value in sorted(feeds.items()))
        if key not in self._captured:
            self._captured[key] = self._capture(feeds)
        captured = self._captured[key]
        for name, value in feeds.items():
            captured.inputs[name].copy_(value)
        self._part_ms = {"action": gpu_ms(captured.graph.replay)}
        self._part_calls = {"action": sum(self._bundle.program.calls.values())}
        return captured.outputs

    def _capture(self, feeds: Mapping[str, Tensor]) -> "_Captured":
        inputs = {name: value.to(self._device) for name, value in feeds.items()}
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types there
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_PASSES):
                self._run_program(inputs, PartLog())
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            values = self._run_program(inputs, PartLog())
        return _Captured(graph, inputs, {spec.name: values[spec.name] for spec in self.outputs})


class _Captured:
    """A captured action, and the tensors that it reads and writes."""

    def __init__(
        self, graph: "torch.cuda.CUDAGraph", inputs: dict[str, Tensor], outputs: dict[str, Tensor]
    ) -> None:
        self.graph, self.inputs, self.outputs = graph, inputs, outputs

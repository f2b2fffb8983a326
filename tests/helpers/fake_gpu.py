"""A GPU and a TensorRT runtime that compute on the CPU but keep the real ones' rules.

Nothing runs before `synchronize`, pinned memory is read when a copy runs and not when it is asked
for, memory is a size and an address, a captured graph holds the context it was captured of, and a
context that was captured must not change. Breaking a rule is an AssertionError.
"""

import gc
import hashlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import tensorrt_rtx as rtx
from numpy.typing import DTypeLike, NDArray

from engines.ort import session_options
from engines.trt.device import Address, CaptureError, DeviceError
from engines.trt.gpu import Gpu
from engines.trt.modules import TRAITS, TrtModule
from engines.trt.sidecar import Sidecar
from qvla_export.shared.bundle import Bundle

RTX4070 = Gpu("NVIDIA GeForce RTX 4070", "sm_89")
Work = Callable[[], None]


@dataclass
class Event:
    ms: float | None = None


@dataclass
class Graph:
    work: list[Work]
    contexts: list["Context"]
    alive: bool = True


class FakeDevice:
    """Implements `engines.trt.device.Device`."""

    def __init__(self, gpu: Gpu = RTX4070, memory_bytes: int = 1 << 30) -> None:
        self.gpu, self.stream = gpu, 7
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.graphs: list[Graph] = []
        self.launched = self.events = 0
        self.captures = True
        # Engines that must be gone before the GPU is left.
        self.holders: list[weakref.ref[Engine]] = []
        self.closed = False
        self._free_bytes = memory_bytes
        self._next, self._clock_ms = 0x7F00_0000_0000, 0.0
        self._queue: list[Work] = []
        self._capturing: Graph | None = None

    def allocate(self, nbytes: int) -> Address:
        assert self._capturing is None, "allocation while capturing"
        if nbytes > self._free_bytes:
            raise DeviceError(f"cannot allocate {nbytes} bytes on the GPU: out of memory")
        self._free_bytes -= nbytes
        address = Address(self._next)
        self._next += (nbytes // 256 + 2) * 256
        self.memory[address] = np.full(nbytes, 0xA5, np.uint8)
        return address

    def free(self, address: Address) -> None:
        self._free_bytes += self.memory.pop(address).nbytes

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        return np.full(shape, 0x5A, dtype)

    def copy_in(self, address: Address, source: NDArray[Any]) -> None:
        assert source.flags.c_contiguous
        self.put(lambda: self.write(address, source))

    def copy_out(self, destination: NDArray[Any], address: Address) -> None:
        assert destination.flags.c_contiguous

        def work() -> None:
            flat = destination.reshape(-1).view(np.uint8)
            flat[:] = self.memory[address][: flat.nbytes]

        self.put(work)

    def copy(self, destination: Address, source: Address, nbytes: int) -> None:
        assert self._capturing is None and destination != source

        def work() -> None:
            assert nbytes <= self.memory[source].nbytes, "read beyond an allocation"
            self.write(destination, self.memory[source][:nbytes])

        self.put(work)

    def event(self) -> Event:
        self.events += 1
        return Event()

    def record(self, event: Event) -> None:
        def work() -> None:
            event.ms = self._clock_ms

        self.put(work)

    def elapsed_ms(self, start: Event, end: Event) -> float:
        assert start.ms is not None and end.ms is not None, "the events are not past"
        return end.ms - start.ms

    def capture(self, work: Work) -> Graph:
        if not self.captures:
            raise CaptureError("CUDA error 900 in cuStreamBeginCapture_v2")
        assert not self._queue, "capture begins while work is under way"
        self._capturing = graph = Graph([], [])
        try:
            work()
        finally:
            self._capturing = None
        for context in graph.contexts:
            context.captured = True
        self.graphs.append(graph)
        return graph

    def launch(self, graph: Graph) -> None:
        assert graph.alive, "launch of a freed graph"
        self.launched += 1
        for work in graph.work:
            self.put(work)

    def free_graph(self, graph: Graph) -> None:
        assert graph.alive and not self._queue, "graph freed twice, or while it may run"
        graph.alive = False
        graph.work.clear()
        graph.contexts.clear()

    def synchronize(self) -> None:
        assert self._capturing is None, "synchronize while capturing"
        while self._queue:
            self._clock_ms += 1.0
            self._queue.pop(0)()

    def close(self) -> None:
        assert not self._queue
        if any(engine() for engine in self.holders):
            gc.collect()
        assert not any(engine() for engine in self.holders), "an engine outlives its GPU"
        self.closed = True

    @property
    def living_graphs(self) -> int:
        return sum(graph.alive for graph in self.graphs)

    @property
    def busy(self) -> bool:
        return bool(self._queue)

    @property
    def capturing(self) -> Graph | None:
        return self._capturing

    def put(self, work: Work) -> None:
        (self._queue if self._capturing is None else self._capturing.work).append(work)

    def write(self, address: int, value: NDArray[Any]) -> None:
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        assert data.nbytes <= self.memory[address].nbytes, "write beyond an allocation"
        self.memory[address][: data.nbytes] = data

    def read(self, address: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert nbytes <= self.memory[address].nbytes, "read beyond an allocation"
        return self.memory[address][:nbytes].view(dtype).reshape(shape).copy()


@dataclass
class Context:
    """An `IExecutionContext`."""

    engine: "Engine"
    device: FakeDevice
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    scratch: tuple[int, int] | None = None
    profile: int | None = None
    captured: bool = False
    ran: bool = False
    profiler: Any = None
    enqueue_emits_profile: bool = True
    unreported: int = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        self._change()
        assert size >= self.engine.device_memory_size_v2 and memory in self.device.memory
        self.scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._change()
        assert stream_handle == self.device.stream
        self.profile = profile_index
        return profile_index < len(self.engine.sidecar.origin.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._change()
        assert self.profile is not None, "shapes before the profile"
        if not self.engine.sidecar.origin.profiles[self.profile][name].admits(shape):
            self.engine.logger.log(rtx.ILogger.ERROR, f"{name}: shape out of profile")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._change()
        self.addresses[name] = memory
        return memory in self.device.memory

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {
            spec.name: np.zeros(self.shapes[spec.name], spec.dtype)
            for spec in self.engine.part.inputs
        }
        return dict(self.engine.run(zeros))[name].shape

    def execute_async_v3(self, stream_handle: int) -> bool:
        part, device = self.engine.part, self.device
        assert stream_handle == device.stream and self.scratch is not None
        assert {s.name for s in (*part.inputs, *part.outputs)} == set(self.addresses)
        graph = device.capturing
        if self.engine.broken or (graph is not None and not self.ran):
            # The first run does what TensorRT has put off, which a capture cannot hold.
            self.engine.logger.log(rtx.ILogger.ERROR, "operation not permitted: cudaError 900")
            return False
        self.ran = True
        if graph is not None:
            assert self.profiler is None, "a captured graph reports nothing to a profiler"
            graph.contexts.append(self)
        self.unreported += 1
        shapes, addresses = dict(self.shapes), dict(self.addresses)

        def work() -> None:
            taken = {
                s.name: device.read(addresses[s.name], shapes[s.name], s.dtype) for s in part.inputs
            }
            for name, value in self.engine.run(taken):
                device.write(addresses[name], value)

        device.put(work)
        return True

    def report_to_profiler(self) -> bool:
        assert not self.enqueue_emits_profile, "enqueue has reported already"
        assert not self.device.busy, "reported before the device is done"
        if self.profiler is None or not self.unreported:
            return False
        self.unreported = 0
        for name, ms in self.engine.layer_ms.items():
            self.profiler.report_layer_time(name, ms)
        return True

    def _change(self) -> None:
        assert not self.captured, "a context was changed after it was captured"


class Engine:
    """An `ICudaEngine` that runs a part's graph with ONNX Runtime."""

    device_memory_size_v2 = 4096

    def __init__(self, runtime: "FakeTensorRt", sidecar: Sidecar, logger: Any) -> None:
        bundle = runtime.bundle
        self.sidecar, self.logger, self.runtime = sidecar, logger, runtime
        self.part = next(s for s in bundle.parts if s.name == sidecar.origin.part)
        self.broken = self.part.name in runtime.broken
        self.layer_ms = runtime.layer_ms.get(self.part.name, {})
        self._session = onnxruntime.InferenceSession(
            str(bundle.model_path(self.part)),
            session_options(bundle, 1, "unpacked"),
            providers=["CPUExecutionProvider"],
        )
        self._specs = (*self.part.inputs, *self.part.outputs)
        self.num_io_tensors = len(self._specs)

    def get_tensor_name(self, index: int) -> str:
        return self._specs[index].name

    def get_tensor_dtype(self, name: str) -> str:
        return next(spec.dtype for spec in self._specs if spec.name == name)

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(strategy=None)

        def set_strategy(strategy: Any) -> None:
            config.strategy = strategy

        config.set_execution_context_allocation_strategy = set_strategy
        return config

    def create_execution_context(self, how: Any) -> Context:
        if self.runtime.specializes:
            strategies = rtx.DynamicShapesKernelSpecializationStrategy
            assert how.dynamic_shapes_kernel_specialization_strategy == strategies.EAGER
            how = how.strategy
        assert how == rtx.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self, self.runtime.device)

    def run(self, feeds: dict[str, NDArray[Any]]) -> Iterable[tuple[str, NDArray[Any]]]:
        names = [spec.name for spec in self.part.outputs]
        return zip(names, self._session.run(names, feeds), strict=True)


class FakeTensorRt:
    """The runtime half of a TensorRT module; engines were built by the real builder."""

    def __init__(
        self, bundle: Bundle, sidecars: Iterable[Sidecar], device: FakeDevice, name: str
    ) -> None:
        self.bundle, self.device = bundle, device
        self.deserialized: list[str] = []
        # Stages whose execution fails.
        self.broken: tuple[str, ...] = ()
        # Stage -> what its layers report to a profiler.
        self.layer_ms: dict[str, dict[str, float]] = {}
        self.specializes = name == "tensorrt_rtx"
        known = {sidecar.engine_sha256: sidecar for sidecar in sidecars}
        fake = self

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
                digest = hashlib.sha256(data).hexdigest()
                fake.deserialized.append(digest)
                if digest not in known:
                    message = "The engine plan file is generated on an incompatible device"
                    self.logger.log(rtx.ILogger.ERROR, message)
                    return None
                engine = Engine(fake, known[digest], self.logger)
                fake.device.holders.append(weakref.ref(engine))
                return engine

        self.api = SimpleNamespace(
            Runtime=Runtime,
            ILogger=rtx.ILogger,
            IProfiler=rtx.IProfiler,
            nptype=np.dtype,
            ExecutionContextAllocationStrategy=rtx.ExecutionContextAllocationStrategy,
        )
        if self.specializes:
            strategies = rtx.DynamicShapesKernelSpecializationStrategy
            self.api.DynamicShapesKernelSpecializationStrategy = strategies
        self.name = name

    def module(self, version: str = rtx.__version__) -> TrtModule:
        return TrtModule("tensorrt_rtx", version, TRAITS["tensorrt_rtx"], self.api)

"""One part on the GPU: an execution context and a captured graph for every shape it meets."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.base import EngineError
from engines.trt.buffers import Buffers
from engines.trt.device import Address, CaptureError, Device, Graph
from engines.trt.failures import explain
from engines.trt.log import Log
from engines.trt.modules import TrtModule
from engines.trt.shapes import Shape

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scratch:
    """Device memory for activations; parts run one after the other, so they share it."""

    address: Address
    nbytes: int


@dataclass(frozen=True)
class RunnerSetup:
    """What the runners of all parts of one bundle share."""

    # Module that made the engines, and what its messages go to.
    module: TrtModule
    log: Log
    device: Device
    # Which memory each tensor has now.
    buffers: Buffers
    # At least `engine.device_memory_size_v2` bytes of the most demanding engine.
    scratch: Scratch
    # Prompt lengths whose contexts are kept.
    max_shapes: int


@dataclass(frozen=True)
class PartTimer:
    """A part that runs alone and reports its layers."""

    # Runs it once and waits until it is done.
    run: Callable[[], None]
    outputs: Mapping[str, Shape]


@dataclass
class _ShapeContext:
    """A context whose shapes and addresses are set once, and what was captured of it."""

    # An `IExecutionContext`.
    native: Any
    outputs: Mapping[str, Shape]
    graph: Graph | None = None
    has_run: bool = False
    capture_attempted: bool = False


class PartRunner:
    """Puts one part's work into the device's stream.

    Every input shape has a context of its own, and every set of addresses: a captured graph holds
    the context's state, and TensorRT forbids changing that state afterwards. Contexts are small,
    since the memory for activations is shared; the least recently used beyond `max_shapes` prompt
    lengths is dropped.
    """

    def __init__(
        self,
        name: str,
        engine: Any,
        tensors: Sequence[str],
        setup: RunnerSetup,
        contexts: int = 1,
    ) -> None:
        """Prepare nothing yet; contexts are made for the shapes that come.

        Args:
            name: the part's.
            engine: deserialized, an `ICudaEngine`.
            tensors: names of its inputs and outputs.
            setup: where and how it runs.
            contexts: that actions of one prompt length take.
        """
        self._name, self._engine, self._tensors = name, engine, tuple(tensors)
        self._most_contexts = setup.max_shapes * contexts
        self._setup, self._device = setup, setup.device
        self._contexts: OrderedDict[Any, _ShapeContext] = OrderedDict()
        # Why the part runs without a graph; None while it does not.
        self.graph_failure: str | None = None

    def enqueue(self, inputs: Mapping[str, Shape], profile: int) -> Mapping[str, Shape]:
        """Put the part into the stream; return the shapes of its outputs.

        Args:
            inputs: their shapes.
            profile: number of the engine's profile that they are in.

        Raises:
            EngineError: TensorRT refuses a shape, or the work.
        """
        context = self._for(inputs, profile)
        if context.graph is not None:
            self._device.launch(context.graph)
        else:
            self._execute(context)
        return context.outputs

    def capture(self) -> None:
        """Capture the part for all that `enqueue` has run and that was not tried before.

        The first run does what TensorRT puts off until then, which a graph must not hold.
        """
        for context in self._contexts.values():
            if context.has_run and not context.capture_attempted:
                self._capture(context)

    def open_timer(self, inputs: Mapping[str, Shape], profile: int, profiler: Any) -> PartTimer:
        """Return the part in a context of its own that tells an `IProfiler` of its layers.

        Without a graph: TensorRT reports nothing of a captured one, and reporting slows it down.

        Raises:
            EngineError: TensorRT refuses a shape.
        """
        context = self._new_shape_context(inputs, profile)
        context.native.profiler = profiler
        # Reported when asked for, once the device is done.
        context.native.enqueue_emits_profile = False

        def run() -> None:
            self._execute(context)
            self._device.synchronize()
            self._require(context.native.report_to_profiler(), "reports no layer times")

        return PartTimer(run, context.outputs)

    def close(self) -> None:
        """Free graphs and contexts."""
        while self._contexts:
            self._drop(self._contexts.popitem()[1])

    def _for(self, inputs: Mapping[str, Shape], profile: int) -> _ShapeContext:
        key = (profile, tuple(sorted(inputs.items())), tuple(self._addresses().values()))
        if key not in self._contexts:
            self._contexts[key] = self._new_shape_context(inputs, profile)
        self._contexts.move_to_end(key)
        while len(self._contexts) > self._most_contexts:
            # A launched graph may still be running.
            self._device.synchronize()
            self._drop(self._contexts.popitem(last=False)[1])
        return self._contexts[key]

    def _new_shape_context(self, inputs: Mapping[str, Shape], profile: int) -> _ShapeContext:
        context = _new_context(self._engine, self._setup.module.api)
        self._require(context is not None, "has no execution context")
        context.set_device_memory(self._setup.scratch.address, self._setup.scratch.nbytes)
        stream = self._device.stream
        has_profile = context.set_optimization_profile_async(profile, stream)
        self._require(has_profile, f"has no profile {profile}")
        for name, shape in inputs.items():
            self._require(context.set_input_shape(name, shape), f"refuses {name!r} of {shape}")
        for name, address in self._addresses().items():
            self._require(context.set_tensor_address(name, address), f"refuses {name!r}")
        names = {*self._tensors} - inputs.keys()
        outputs = {name: tuple(context.get_tensor_shape(name)) for name in sorted(names)}
        return _ShapeContext(context, outputs)

    def _addresses(self) -> dict[str, Address]:
        """Device memory of every input and output, of the largest shape."""
        return {name: self._setup.buffers.addresses[name] for name in self._tensors}

    def _execute(self, context: _ShapeContext) -> None:
        self._require(context.native.execute_async_v3(self._device.stream), "cannot be executed")
        context.has_run = True

    def _capture(self, context: _ShapeContext) -> None:
        context.capture_attempted = True
        try:
            context.graph = self._device.capture(lambda: self._execute(context))
        except (CaptureError, EngineError) as error:
            if self.graph_failure is None:
                _LOGGER.warning("part %s runs without a CUDA graph: %s", self._name, str(error))
            self.graph_failure = str(error)

    def _drop(self, context: _ShapeContext) -> None:
        if context.graph is not None:
            self._device.free_graph(context.graph)

    def _require(self, ok: bool, what: str) -> None:
        if not ok:
            raise EngineError(explain(f"part {self._name!r} {what}", self._setup.log.messages))


def _new_context(engine: Any, api: Any) -> Any:
    """Return a context whose activations lie in memory that it is given."""
    strategy = api.ExecutionContextAllocationStrategy.USER_MANAGED
    specialization: Any = getattr(api, "DynamicShapesKernelSpecializationStrategy", None)
    if specialization is None:
        return engine.create_execution_context(strategy)
    # TensorRT for RTX compiles kernels for a shape in the background and changes over later; a
    # graph captured before would keep the slower ones.
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
    return engine.create_execution_context(config)

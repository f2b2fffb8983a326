"""A GPU through pycuda, which has to be compiled where it runs: see `engines.trt.device`."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engines.trt.device import Address, CaptureError, DeviceError, Event, Graph
from engines.trt.gpu import DRIVER, Gpu

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may use CUDA meanwhile


class PycudaDevice:
    """The first GPU through pycuda; graphs, which pycuda lacks, through the driver itself.

    The primary context is used, as TensorRT's own allocations are there. A server infers on another
    thread than it loads on, and pycuda frees what belongs to a context only where that context is
    current: so it is made current for every call, and everything allocated is kept until `close`.
    """

    def __init__(self) -> None:
        """Open the GPU.

        Raises:
            ImportError: pycuda is missing.
            DeviceError: the GPU cannot be opened.
        """
        import pycuda.driver as cuda

        self._cuda = cuda
        try:
            cuda.init()
            device = cuda.Device(0)
            self._context = device.retain_primary_context()
            with _Current(self._context):
                self._stream = cuda.Stream()
        except cuda.Error as error:
            raise DeviceError(f"the NVIDIA GPU cannot be opened: {error}") from error
        major, minor = device.compute_capability()
        self._gpu = Gpu(device.name(), f"sm_{major}{minor}")
        self._driver = ctypes.CDLL(DRIVER)
        # Address -> allocation; pinned arrays and events.
        self._memory: dict[Address, Any] = {}
        self._kept: list[Any] = []

    @property
    def gpu(self) -> Gpu:
        """Which GPU it is."""
        return self._gpu

    @property
    def stream(self) -> int:
        """Handle of the stream that all work goes to."""
        return int(self._stream.handle)

    def allocate(self, nbytes: int) -> Address:
        """Return device memory."""
        with _Current(self._context):
            try:
                allocation = self._cuda.mem_alloc(max(1, nbytes))
            except self._cuda.Error as error:
                raise DeviceError(f"cannot allocate {nbytes} bytes on the GPU: {error}") from error
        address = Address(int(allocation))
        self._memory[address] = allocation
        return address

    def free(self, address: Address) -> None:
        """Give device memory back."""
        with _Current(self._context):
            self._memory.pop(address).free()

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return page-locked host memory."""
        with _Current(self._context):
            try:
                array: NDArray[Any] = self._cuda.pagelocked_empty(shape, np.dtype(dtype))
            except self._cuda.Error as error:
                raise DeviceError(f"cannot allocate pinned memory: {error}") from error
        self._kept.append(array)
        # A view: the array itself is dropped by `close` only.
        return array.view()

    def copy_in(self, address: Address, source: NDArray[Any]) -> None:
        """Copy pinned host memory to the device."""
        with _Current(self._context):
            self._cuda.memcpy_htod_async(address, source, self._stream)

    def copy_out(self, destination: NDArray[Any], address: Address) -> None:
        """Copy device memory to pinned host memory."""
        with _Current(self._context):
            self._cuda.memcpy_dtoh_async(destination, address, self._stream)

    def copy(self, destination: Address, source: Address, nbytes: int) -> None:
        """Copy device memory to other device memory."""
        with _Current(self._context):
            self._cuda.memcpy_dtod_async(destination, source, nbytes, self._stream)

    def event(self) -> Event:
        """Return a mark that can be put into the stream, again and again."""
        with _Current(self._context):
            event = self._cuda.Event()
        self._kept.append(event)
        return event

    def record(self, event: Event) -> None:
        """Put a mark at this point of the stream."""
        with _Current(self._context):
            event.record(self._stream)

    def elapsed_ms(self, start: Event, end: Event) -> float:
        """Return the milliseconds between two events that are past."""
        with _Current(self._context):
            return float(start.time_till(end))

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` puts into the stream instead of running it."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        stream = ctypes.c_void_p(self.stream)
        with _Current(self._context):
            self._call(CaptureError, "cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
            try:
                try:
                    work()
                finally:
                    # A capture that failed must be ended too, or the stream stays unusable.
                    status = self._driver.cuStreamEndCapture(stream, ctypes.byref(graph))
                if status:
                    raise CaptureError(f"CUDA error {status} in cuStreamEndCapture")
                made = (ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
                self._call(CaptureError, "cuGraphInstantiateWithFlags", *made)
            finally:
                self._driver.cuGraphDestroy(graph)
        return executable

    def launch(self, graph: Graph) -> None:
        """Run a captured graph."""
        with _Current(self._context):
            self._call(DeviceError, "cuGraphLaunch", graph, ctypes.c_void_p(self.stream))

    def free_graph(self, graph: Graph) -> None:
        """Give a graph's memory back."""
        with _Current(self._context):
            self._call(DeviceError, "cuGraphExecDestroy", graph)

    def synchronize(self) -> None:
        """Wait until the stream is empty."""
        with _Current(self._context):
            try:
                self._stream.synchronize()
            except self._cuda.Error as error:
                raise DeviceError(f"the GPU failed: {error}") from error

    def close(self) -> None:
        """Leave the GPU."""
        with _Current(self._context):
            self._memory.clear()
            self._kept.clear()
            del self._stream

    def _call(self, error: type[DeviceError], function: str, *arguments: Any) -> None:
        if status := getattr(self._driver, function)(*arguments):
            raise error(f"CUDA error {status} in {function}")


class _Current:
    """Makes a context current in this thread: a server infers in other threads than it loads."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._context.push()

    def __exit__(self, *_: object) -> None:
        self._context.pop()

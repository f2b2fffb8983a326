"""A GPU through cuda-bindings, NVIDIA's own binding of the driver: see `engines.trt.device`.

It has wheels for both JetPacks. Every function returns its status first (CUDA driver API, "Data
types used by CUDA driver"), and nothing is freed that `close` or the caller does not free.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engines.trt.device import Address, CaptureError, DeviceError, Event, Graph
from engines.trt.gpu import Gpu

_DEFAULT = 0


class BindingsDevice:
    """The first GPU, its primary context and one stream.

    TensorRT's own allocations are in the primary context. A server infers on another thread than it
    loads on: the context is made current for every call.
    """

    def __init__(self) -> None:
        """Open the GPU.

        Raises:
            ImportError: cuda-bindings is missing.
            DeviceError: the GPU cannot be opened.
        """
        from cuda.bindings import driver

        self._driver: Any = driver
        self._call("cuInit", _DEFAULT)
        self._device = self._call("cuDeviceGet", 0)
        length = 256
        name = self._call("cuDeviceGetName", length, self._device)
        self._gpu = Gpu(name.split(b"\0")[0].decode(), f"sm_{self._capability()}")
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._memory: dict[Address, Any] = {}
        self._pinned: list[int] = []
        self._events: list[Any] = []
        try:
            self._stream = self._inside("cuStreamCreate", _DEFAULT)
        except DeviceError:
            self._call("cuDevicePrimaryCtxRelease", self._device)
            raise

    @property
    def gpu(self) -> Gpu:
        """Which GPU it is."""
        return self._gpu

    @property
    def stream(self) -> int:
        """Handle of the stream that all work goes to."""
        return int(self._stream)

    def allocate(self, nbytes: int) -> Address:
        """Return device memory."""
        try:
            pointer = self._inside("cuMemAlloc", max(1, nbytes))
        except DeviceError as error:
            raise DeviceError(f"cannot allocate {nbytes} bytes on the GPU: {error}") from error
        address = Address(int(pointer))
        self._memory[address] = pointer
        return address

    def free(self, address: Address) -> None:
        """Give device memory back."""
        self._inside("cuMemFree", self._memory.pop(address))

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return page-locked host memory."""
        nbytes = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        try:
            address = int(self._inside("cuMemHostAlloc", nbytes, _DEFAULT))
        except DeviceError as error:
            raise DeviceError(f"cannot allocate pinned memory: {error}") from error
        self._pinned.append(address)
        buffer = (ctypes.c_byte * nbytes).from_address(address)
        return np.ndarray(shape, dtype, memoryview(buffer).cast("B"))

    def copy_in(self, address: Address, source: NDArray[Any]) -> None:
        """Copy pinned host memory to the device."""
        place, nbytes = source.ctypes.data, source.nbytes
        self._inside("cuMemcpyHtoDAsync", address, place, nbytes, self._stream)

    def copy_out(self, destination: NDArray[Any], address: Address) -> None:
        """Copy device memory to pinned host memory."""
        place, nbytes = destination.ctypes.data, destination.nbytes
        self._inside("cuMemcpyDtoHAsync", place, address, nbytes, self._stream)

    def copy(self, destination: Address, source: Address, nbytes: int) -> None:
        """Copy device memory to other device memory."""
        self._inside("cuMemcpyDtoDAsync", destination, source, nbytes, self._stream)

    def event(self) -> Event:
        """Return a mark that can be put into the stream, again and again."""
        event = self._inside("cuEventCreate", _DEFAULT)
        self._events.append(event)
        return event

    def record(self, event: Event) -> None:
        """Put a mark at this point of the stream."""
        self._inside("cuEventRecord", event, self._stream)

    def elapsed_ms(self, start: Event, end: Event) -> float:
        """Return the milliseconds between two events that are past."""
        return float(self._inside("cuEventElapsedTime", start, end))

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` puts into the stream instead of running it."""
        # Other threads may use CUDA meanwhile.
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._inside("cuStreamBeginCapture", self._stream, mode, error=CaptureError)
        try:
            work()
        except BaseException:
            # A capture that failed must be ended too, or the stream stays unusable.
            self._end_failed_capture()
            raise
        graph = self._inside("cuStreamEndCapture", self._stream, error=CaptureError)
        try:
            return self._inside("cuGraphInstantiate", graph, _DEFAULT, error=CaptureError)
        finally:
            self._inside("cuGraphDestroy", graph)

    def launch(self, graph: Graph) -> None:
        """Run a captured graph."""
        self._inside("cuGraphLaunch", graph, self._stream)

    def free_graph(self, graph: Graph) -> None:
        """Give a graph's memory back."""
        self._inside("cuGraphExecDestroy", graph)

    def synchronize(self) -> None:
        """Wait until the stream is empty."""
        try:
            self._inside("cuStreamSynchronize", self._stream)
        except DeviceError as error:
            raise DeviceError(f"the GPU failed: {error}") from error

    def close(self) -> None:
        """Leave the GPU."""
        for address in [*self._memory]:
            self.free(address)
        for pinned in self._pinned:
            self._inside("cuMemFreeHost", pinned)
        for event in self._events:
            self._inside("cuEventDestroy", event)
        self._pinned.clear()
        self._events.clear()
        self._inside("cuStreamDestroy", self._stream)
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def _capability(self) -> str:
        attributes = self._driver.CUdevice_attribute
        name = "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY"
        parts = (getattr(attributes, f"{name}_{part}") for part in ("MAJOR", "MINOR"))
        return "".join(
            str(self._call("cuDeviceGetAttribute", part, self._device)) for part in parts
        )

    def _end_failed_capture(self) -> None:
        status, graph = self._within(self._driver.cuStreamEndCapture, self._stream)
        if int(status) == 0:
            self._within(self._driver.cuGraphDestroy, graph)

    def _inside(
        self, function: str, *arguments: Any, error: type[DeviceError] = DeviceError
    ) -> Any:
        """Call a function of the driver where the context is current; return what it gives."""
        return self._value(
            function, self._within(getattr(self._driver, function), *arguments), error
        )

    def _within(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._call("cuCtxPushCurrent", self._context)
        try:
            return function(*arguments)
        finally:
            self._call("cuCtxPopCurrent")

    def _call(self, function: str, *arguments: Any) -> Any:
        return self._value(function, getattr(self._driver, function)(*arguments), DeviceError)

    def _value(self, function: str, results: Any, error: type[DeviceError]) -> Any:
        """Return what a function gives beside its status; None where that is nothing."""
        status, *values = results
        if int(status) != 0:
            name = getattr(status, "name", status)
            raise error(f"CUDA error {int(status)} ({name}) in {function}")
        return values[0] if values else None

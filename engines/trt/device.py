"""The seam to the GPU: memory, copies, one stream, events and graphs."""

from collections.abc import Callable
from typing import Any, NewType, Protocol

from numpy.typing import DTypeLike, NDArray

from engines.base import EngineError
from engines.trt.gpu import Gpu

# Address of device memory; an event or a captured graph, as the device knows them.
Address = NewType("Address", int)
Event = Any
Graph = Any


class DeviceError(EngineError):
    """The GPU or its driver refuses a call."""


class CaptureError(DeviceError):
    """Work cannot be captured as a graph; it runs without one."""


class Device(Protocol):
    """One GPU with one stream; everything but `synchronize` returns before the GPU is done."""

    @property
    def gpu(self) -> Gpu:
        """Which GPU it is."""
        ...

    @property
    def stream(self) -> int:
        """Handle of the stream that all work goes to."""
        ...

    def allocate(self, nbytes: int) -> Address:
        """Return device memory.

        Raises:
            DeviceError: there is not enough.
        """
        ...

    def free(self, address: Address) -> None:
        """Give device memory back."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return host memory that copies do not stage through another buffer.

        It is given back by `close`, after which it must not be touched.
        """
        ...

    def copy_in(self, address: Address, source: NDArray[Any]) -> None:
        """Copy pinned host memory to the device; `source` must stay as it is until then."""
        ...

    def copy_out(self, destination: NDArray[Any], address: Address) -> None:
        """Copy device memory to pinned host memory."""
        ...

    def copy(self, destination: Address, source: Address, nbytes: int) -> None:
        """Copy device memory to other device memory."""
        ...

    def event(self) -> Event:
        """Return a mark that can be put into the stream, again and again."""
        ...

    def record(self, event: Event) -> None:
        """Put a mark at this point of the stream."""
        ...

    def elapsed_ms(self, start: Event, end: Event) -> float:
        """Return the milliseconds between two events that are past."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` puts into the stream instead of running it.

        Raises:
            CaptureError: something in it cannot be recorded.
        """
        ...

    def launch(self, graph: Graph) -> None:
        """Run a captured graph."""
        ...

    def free_graph(self, graph: Graph) -> None:
        """Give a graph's memory back."""
        ...

    def synchronize(self) -> None:
        """Wait until the stream is empty.

        Raises:
            DeviceError: something in it failed.
        """
        ...

    def close(self) -> None:
        """Leave the GPU."""
        ...

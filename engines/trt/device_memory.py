"""The noun `DeviceMemory`: what of a GPU's memory a piece of work takes, asked of the driver.

On a Jetson CPU and GPU share one memory: there a free byte is one of the whole system.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from engines.trt.gpu import DRIVER


@dataclass(eq=False)
class DeviceMemory:
    """The first GPU's free memory, from when it was opened on.

    Other processes count too: measure on a GPU that nobody else uses.
    """

    # Free bytes now; None where they cannot be read.
    read_free: Callable[[], int | None]
    # At first, and at least since.
    before_bytes: int | None = field(init=False)
    least_bytes: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.before_bytes = self.least_bytes = self.read_free()

    def look(self) -> None:
        """Note how much is free at this moment."""
        free = self.read_free()
        if free is not None and self.least_bytes is not None:
            self.least_bytes = min(self.least_bytes, free)

    @property
    def taken_bytes(self) -> int | None:
        """The most that was taken at a moment somebody looked; None without a GPU."""
        if self.before_bytes is None or self.least_bytes is None:
            return None
        return self.before_bytes - self.least_bytes


@contextlib.contextmanager
def device_memory(open_driver: Callable[[str], Any] = ctypes.CDLL) -> Iterator[DeviceMemory]:
    """Watch the first GPU's memory; one that cannot be asked is no error.

    Args:
        open_driver: opens NVIDIA's driver library by its name.
    """
    try:
        driver = open_driver(DRIVER)
    except OSError:
        driver = None
    # CUDA Driver API: contexts are made current a thread, so ours is put on top and off again.
    context = ctypes.c_void_p()
    has_gpu = driver is not None and not (
        driver.cuInit(0) or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
    )

    def read_free() -> int | None:
        if not has_gpu or driver.cuCtxPushCurrent_v2(context):
            return None
        free, total, own = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(own))
        return None if failed else free.value

    try:
        yield DeviceMemory(read_free)
    finally:
        if has_gpu:
            driver.cuDevicePrimaryCtxRelease_v2(0)

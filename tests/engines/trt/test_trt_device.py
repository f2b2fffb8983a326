"""The device through pycuda, on one and a driver that keep the rules of theirs.

pycuda frees an object only where its context is current; anywhere else it leaks with a warning.
"""

import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.trt.device import CaptureError, DeviceError
from engines.trt.devices import open_device
from engines.trt.pycuda_device import PycudaDevice


class Pycuda:
    """What the fake module and the fake driver share."""

    def __init__(self) -> None:
        self.current = threading.local()
        self.calls: list[str] = []
        self.leaks: list[str] = []
        self.alive = 0
        self.free_bytes = 1000
        # Driver function -> status.
        self.failing: dict[str, int] = {}

    @property
    def stack(self) -> list[Any]:
        if not hasattr(self.current, "stack"):
            self.current.stack = []
        return self.current.stack

    def module(self) -> ModuleType:
        cuda, driver = self, ModuleType("pycuda.driver")

        class Error(Exception):
            pass

        class Context:
            def push(self) -> None:
                cuda.stack.append(self)

            @staticmethod
            def pop() -> None:
                cuda.stack.pop()

        class Device:
            def __init__(self, index: int) -> None:
                assert index == 0

            def retain_primary_context(self) -> Context:
                return Context()

            def compute_capability(self) -> tuple[int, int]:
                return 8, 7

            def name(self) -> str:
                return "Orin"

        class Owned:
            """Belongs to a context, as all that pycuda allocates."""

            def __init__(self) -> None:
                assert cuda.stack, "no context is current"
                cuda.alive += 1

            def __del__(self) -> None:
                cuda.alive -= 1
                if not cuda.stack:
                    cuda.leaks.append(type(self).__name__)

        class Stream(Owned):
            handle = 4711

            def synchronize(self) -> None:
                assert cuda.stack
                cuda.calls.append("synchronize")
                if "synchronize" in cuda.failing:
                    raise Error("illegal address")

        class Event(Owned):
            ms = 0.0

            def record(self, stream: Stream) -> "Event":
                assert cuda.stack and isinstance(stream, Stream)
                self.ms = float(len(cuda.calls))
                cuda.calls.append("record")
                return self

            def time_till(self, end: "Event") -> float:
                return end.ms - self.ms

        class Allocation(Owned):
            def __init__(self, nbytes: int) -> None:
                if nbytes > cuda.free_bytes:
                    cuda.alive += 1
                    raise Error("cuMemAlloc failed: out of memory")
                super().__init__()

            def __int__(self) -> int:
                return id(self)

            def free(self) -> None:
                assert cuda.stack
                cuda.calls.append("free")

        def pagelocked_empty(shape: tuple[int, ...], dtype: Any) -> Any:
            assert cuda.stack
            return np.zeros(shape, dtype)

        def copy(name: str) -> Callable[..., None]:
            def call(a: Any, b: Any, stream: Stream) -> None:
                assert cuda.stack and isinstance(stream, Stream)
                cuda.calls.append(name)

            return call

        members = {
            "Error": Error,
            "Device": Device,
            "Stream": Stream,
            "Event": Event,
            "init": lambda: cuda.calls.append("init"),
            "mem_alloc": Allocation,
            "pagelocked_empty": pagelocked_empty,
            "memcpy_htod_async": copy("in"),
            "memcpy_dtoh_async": copy("out"),
            "memcpy_dtod_async": lambda a, b, nbytes, stream: copy(f"move {nbytes}")(a, b, stream),
        }
        vars(driver).update(members)
        return driver

    def __getattr__(self, name: str) -> Callable[..., int]:
        """A function of the CUDA driver."""
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            if not name.startswith(("cuInit", "cuDevice")):
                assert self.stack, f"{name} without a context"
                self.calls.append(name)
            if name == "cuDeviceGetCount":
                arguments[0]._obj.value = 1
            return self.failing.get(name, 0)

        return call


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Pycuda:
    fake = Pycuda()
    package = ModuleType("pycuda")
    driver = fake.module()
    package.driver = driver  # type: ignore[attr-defined]  # a submodule
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    libraries = SimpleNamespace(CDLL=lambda name: fake)
    for module in ("gpu", "pycuda_device"):
        ctypes = sys.modules[f"engines.trt.{module}"].ctypes  # type: ignore[attr-defined]
        names = {name: getattr(ctypes, name) for name in dir(ctypes) if name != "CDLL"}
        replaced = SimpleNamespace(**names, CDLL=libraries.CDLL)
        monkeypatch.setattr(f"engines.trt.{module}.ctypes", replaced)
    return fake


def test_everything_is_freed_where_its_context_is_current(cuda: Pycuda) -> None:
    """Loaded on one thread, used and closed on another, as a server does."""
    device = PycudaDevice()
    assert device.gpu.compute_capability == "sm_87"
    assert device.stream == 4711
    address, events = device.allocate(100), [device.event(), device.event()]
    host = device.pinned((4,), "float32")

    def act() -> None:
        device.record(events[0])
        device.copy_in(address, host)
        device.copy(address, address, 12)
        device.copy_out(host, address)
        device.record(events[1])
        device.synchronize()
        assert device.elapsed_ms(*events) == 4
        device.free(address)
        device.allocate(7)
        events.clear()
        device.close()

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    done = ["record", "in", "move 12", "out", "record", "synchronize", "free"]
    assert cuda.calls == ["init", *done]
    assert cuda.alive == 0
    assert not cuda.leaks and not cuda.stack


def test_a_graph_is_captured_launched_and_freed(cuda: Pycuda) -> None:
    device = PycudaDevice()
    graph = device.capture(lambda: cuda.calls.append("work"))
    device.launch(graph)
    device.free_graph(graph)
    assert cuda.calls == [
        "init",
        "cuStreamBeginCapture_v2",
        "work",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
        "cuGraphLaunch",
        "cuGraphExecDestroy",
    ]


@pytest.mark.parametrize(
    "function", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"]
)
def test_a_capture_that_fails_leaves_the_stream_usable(cuda: Pycuda, function: str) -> None:
    device = PycudaDevice()
    cuda.failing = {function: 901}
    with pytest.raises(CaptureError, match=f"CUDA error 901 in {function}"):
        device.capture(lambda: None)
    begun = function != "cuStreamBeginCapture_v2"
    assert ("cuStreamEndCapture" in cuda.calls) == begun
    assert not cuda.stack


def test_work_that_fails_ends_the_capture(cuda: Pycuda) -> None:
    def work() -> None:
        raise ValueError("refused")

    device = PycudaDevice()
    with pytest.raises(ValueError, match="refused"):
        device.capture(work)
    assert cuda.calls[-2:] == ["cuStreamEndCapture", "cuGraphDestroy"]


def test_failures_of_the_gpu_are_ours(cuda: Pycuda) -> None:
    device = PycudaDevice()
    with pytest.raises(DeviceError, match="cannot allocate 2000 bytes"):
        device.allocate(2000)
    cuda.failing = {"synchronize": 1, "cuGraphLaunch": 700}
    with pytest.raises(DeviceError, match="the GPU failed: illegal address"):
        device.synchronize()
    with pytest.raises(DeviceError, match="CUDA error 700 in cuGraphLaunch"):
        device.launch(None)
    assert not cuda.stack


def test_pycuda_is_used_where_nothing_else_is(
    cuda: Pycuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert isinstance(open_device(), PycudaDevice)


def test_without_a_gpu_or_a_binding(cuda: Pycuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.delitem(sys.modules, "pycuda.driver")
    with pytest.raises(DeviceError, match=r"needs cuda-bindings, or pycuda.*'qvla\[board\]'"):
        open_device()
    cuda.failing = {"cuInit": 100}
    with pytest.raises(DeviceError, match=r"needs an NVIDIA GPU.*qvla verify --runtime ort"):
        open_device()

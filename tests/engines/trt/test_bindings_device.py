"""The device through NVIDIA's real cuda-bindings, on a driver without a GPU that keeps its rules.

A process of its own: the driver stays loaded where it was loaded once.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import HELPERS

SOURCE = HELPERS / "fake_cuda.c"
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("cuda") is None, reason="needs cuda-bindings: qvla[device]"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]
_BEGIN = """
import ctypes, json, threading
import numpy as np
from engines.trt.device import DeviceError
from engines.trt.devices import open_device
fake = ctypes.CDLL("libcuda.so.1")
device = open_device()
said = {}
def fail(name, status):
    fake.fake_fail(name.encode(), status)
def refused(call):
    try:
        call()
    except DeviceError as error:
        return f"{type(error).__name__}: {error}"
"""
_END = """
device.close()
said["alive"], said["depth"] = fake.fake_alive(), fake.fake_depth()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    words = ["cc", "-shared", "-fPIC", SOURCE, "-o", folder / "libcuda.so.1"]
    subprocess.run(words, check=True)
    return folder


def run(driver: Path, script: str) -> dict[str, Any]:
    """Run lines with an open device; return what they said, everything closed."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver)}
    words = [sys.executable, "-c", _BEGIN + script + _END]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    # All is given back, and no context is left current.
    assert (said.pop("alive"), said.pop("depth")) == (0, 0)
    return said


def test_numbers_go_there_and_back_in_the_order_of_the_stream(driver: Path) -> None:
    """Loaded on one thread, used on another, as a server does; the graph sees new numbers."""
    said = run(driver, """
said["device"] = [type(device).__name__, device.gpu.name, device.gpu.compute_capability]
said["stream"] = device.stream
address, events = device.allocate(16), [device.event(), device.event()]
other = device.allocate(16)
there, back = device.pinned((2, 2), "float32"), device.pinned((2, 2), "float32")
there[:], back[:] = [[1, 2], [3, 4]], 0
def act():
    device.record(events[0])
    device.copy_in(address, there)
    device.copy(other, address, 16)
    device.copy_out(back, other)
    device.record(events[1])
    said["before"] = back.tolist()
    device.synchronize()
    said["after"] = back.tolist()
    said["ms"] = device.elapsed_ms(*events)
    there[:] = 7
    graph = device.capture(lambda: (device.copy_in(address, there), device.copy_out(back, address)))
    device.synchronize()
    said["captured"] = back.tolist()
    device.launch(graph)
    device.synchronize()
    said["launched"] = back.tolist()
    device.free_graph(graph)
    device.free(address)
    device.free(other)
thread = threading.Thread(target=act)
thread.start()
thread.join()
""")  # fmt: skip
    assert said == {
        "device": ["BindingsDevice", "Orin", "sm_87"],
        "stream": 4711,
        "before": [[0, 0], [0, 0]],
        "after": [[1, 2], [3, 4]],
        "ms": 1,
        "captured": [[1, 2], [3, 4]],
        "launched": [[7, 7], [7, 7]],
    }


def test_failures_of_the_gpu_are_ours(driver: Path) -> None:
    said = run(driver, """
said["memory"] = refused(lambda: device.allocate(2_000_000))
fail("cuMemHostAlloc", 2)
said["pinned"] = refused(lambda: device.pinned((4,), "float32"))
fail("cuStreamSynchronize", 700)
said["sync"] = refused(device.synchronize)
for name in ("cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"):
    fail(name, 901)
    said[name] = refused(lambda: device.capture(lambda: None))
fail("", 0)
def work():
    raise ValueError("refused")
try:
    device.capture(work)
except ValueError as error:
    said["work"] = str(error)
# The stream takes another capture after each of them.
device.free_graph(device.capture(lambda: None))
""")  # fmt: skip
    assert said.pop("memory") == (
        "DeviceError: cannot allocate 2000000 bytes on the GPU: "
        "CUDA error 2 (CUDA_ERROR_OUT_OF_MEMORY) in cuMemAlloc"
    )
    assert said.pop("pinned").startswith("DeviceError: cannot allocate pinned memory: CUDA error 2")
    assert said.pop("sync") == (
        "DeviceError: the GPU failed: "
        "CUDA error 700 (CUDA_ERROR_ILLEGAL_ADDRESS) in cuStreamSynchronize"
    )
    assert said.pop("work") == "refused"
    assert len(said) == 3
    for name, words in said.items():
        assert words.startswith("CaptureError: CUDA error 901") and words.endswith(f"in {name}")

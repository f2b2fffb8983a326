"""What TensorRT says is turned into a cause and cures; versions, GPU and power mode are read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx
from hypothesis import given
from hypothesis import strategies as st

from engines.trt.failures import explain, find_failure
from engines.trt.gpu import find_gpu, read_power_mode
from engines.trt.log import Log
from engines.trt.modules import TRAITS, TrtModule, admits
from engines.trt.progress import Progress

# As users report them; the first three of one failed build on an Orin.
NVMAP = "NvMapMemAllocInternalTagged: 1075072515 error 12"
FOREIGN = (
    "Could not find any implementation for node "
    "{ForeignNode[/model/layers.0/MatMul.../lm_head/MatMul]}."
)
SCRATCH = "[autotuner] Requested amount of GPU memory (1073741824 bytes) could not be allocated."


@pytest.mark.parametrize(
    ("said", "cause", "cure"),
    [
        ([FOREIGN, NVMAP], "no contiguous memory", "compact_memory"),
        ([NVMAP, SCRATCH, FOREIGN], "no contiguous memory", "--workspace-mb"),
        ([SCRATCH, FOREIGN], "memory of the device or the machine ran out", "smaller parts"),
        (["Error Code 1: Cuda Runtime (out of memory)"], "ran out", "--layers-per-part"),
        ([FOREIGN], "no kernel for a fused part", "drop_caches"),
        ([FOREIGN], "no kernel for a fused part", "(CMA): qvla doctor"),
        ([FOREIGN, NVMAP], "NvMap error 12", "(CMA): qvla doctor"),
        ([FOREIGN, NVMAP], "NvMap error 12", "an output layer over a whole vocabulary is a part"),
        (["Could not find any implementation for node conv1."], "no kernel", "--level"),
        (
            ["engine is generated on an incompatible device, expecting compute 8.7 got 8.9"],
            "built for another GPU",
            "qvla build",
        ),
        (
            ["Serialization assertion stdVersionRead == kVERSION failed.Version tag"],
            "another version of TensorRT",
            "qvla build",
        ),
        (
            ["Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"],
            "no usable NVIDIA driver",
            "--gpus all",
        ),
        (
            ["MyelinCheckException: graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed."],
            "compiles refittable and stripped engines on a GPU",
            "with the GPU",
        ),
        (
            ["MatMul: both inputs must be of the same type: mismatched type HALF and FLOAT"],
            "converts nothing by itself",
            "export the bundle anew",
        ),
    ],
)
def test_known_failures(said: list[str], cause: str, cure: str) -> None:
    message = explain("building part 'decoder' failed", said)
    assert message.startswith("building part 'decoder' failed: ")
    assert cause in message
    assert cure in message
    assert said[-1] in message


def test_unknown_failures_are_quoted() -> None:
    message = explain("it failed", [f"line {i}" for i in range(9)])
    assert "not one of the known ones" in message
    assert "line 8" in message
    assert "line 3" not in message
    assert "gave no reason" in explain("it failed", [])


@given(st.lists(st.text()))
def test_any_words_are_explained(said: list[str]) -> None:
    assert explain("it failed", said)
    assert find_failure(["nothing wrong"]) is None


@pytest.mark.parametrize(
    ("specifier", "version", "admitted"),
    [
        (">=10.3", "10.3.0.26", True),
        (">=10.3", "10.2.9", False),
        (">=10.3,<10.8", "10.7.0.23", True),
        (">=10.3,<10.8", "10.8.0", False),
        (">=10.3,<10.8", "10.16.1", False),
        (">=1.4", "1.7.1.116", True),
        (">=1.4", "1.10", True),
        ("==11.4.1", "11.4.1.0", True),
        ("==11.4", "11.4.1", False),
        (">10, !=11.0", "11.0.0", False),
        (">10 ,!=11.0", "11.0.1", True),
        ("<=10.7", "10.7.0", True),
        (">=10.3", "10.3.0.26+cuda12.6", True),
    ],
)
def test_version_rules(specifier: str, version: str, admitted: bool) -> None:
    assert admits(specifier, version) is admitted


@pytest.mark.parametrize(("specifier", "version"), [("~=1.0", "1.0"), ("", "1"), (">=1", "dev")])
def test_version_rules_that_cannot_be_read(specifier: str, version: str) -> None:
    with pytest.raises(ValueError, match="must"):
        admits(specifier, version)


@given(st.tuples(*[st.integers(0, 50)] * 3), st.tuples(*[st.integers(0, 50)] * 3))
def test_versions_are_ordered_as_numbers(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    left, right = (".".join(map(str, parts)) for parts in (a, b))
    assert admits(f">={right}", left) == (a >= b)
    assert admits(f"<{right}", left) == (a < b)


def test_power_mode_by_name(tmp_path: Path) -> None:
    assert read_power_mode(tmp_path) is None
    (tmp_path / "var/lib/nvpmodel").mkdir(parents=True)
    (tmp_path / "var/lib/nvpmodel/status").write_text("pmode:0002\n")
    assert read_power_mode(tmp_path) == "0002"
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nvpmodel.conf").write_text(
        "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MODE_30W >\n"
    )
    assert read_power_mode(tmp_path) == "MODE_30W"
    (tmp_path / "var/lib/nvpmodel/status").write_text("nonsense")
    assert read_power_mode(tmp_path) is None


@pytest.fixture
def log() -> Log:
    traits = TRAITS["tensorrt_rtx"]
    return Log(TrtModule("tensorrt_rtx", tensorrt_rtx.__version__, traits, tensorrt_rtx))


def test_what_the_driver_prints_comes_before_what_tensorrt_makes_of_it(log: Log) -> None:
    logger = tensorrt_rtx.ILogger
    with log.native_errors():
        log.logger.log(logger.ERROR, FOREIGN)
        log.logger.log(logger.INFO, "not kept")
        os.write(2, f"{NVMAP}\n".encode())
    assert log.messages == [NVMAP, FOREIGN]


def test_the_log_is_bounded_and_reads_the_weights(log: Log) -> None:
    for i in range(1000):
        log.logger.log(tensorrt_rtx.ILogger.ERROR, f"error {i}")
    assert len(log.messages) == 200
    assert log.messages[-1] == "error 999"
    log.logger.log(tensorrt_rtx.ILogger.INFO, "Total Weights Memory: 4203012 bytes")
    assert log.weights_bytes == 4203012


def test_progress_and_interruption() -> None:
    heard: list[tuple[str, int, int]] = []

    def hear(*event: Any) -> None:
        heard.append(event)
        if event[:2] == ("inner", 1):
            raise KeyboardInterrupt

    progress = Progress(tensorrt_rtx, hear)
    monitor = progress.monitor
    monitor.phase_start("outer", None, 2)
    assert monitor.step_complete("outer", 0)
    progress.require_uninterrupted()
    monitor.phase_start("inner", "outer", 3)
    # An exception must not cross native code: the builder is asked to stop instead.
    assert not monitor.step_complete("inner", 0)
    monitor.phase_finish("inner")
    monitor.phase_finish("outer")
    assert heard == [
        ("outer", 0, 2),
        ("outer", 1, 2),
        ("inner", 0, 3),
        ("inner", 1, 3),
        ("inner", 3, 3),
        ("outer", 2, 2),
    ]
    with pytest.raises(KeyboardInterrupt):
        progress.require_uninterrupted()


def test_a_module_without_progress_builds_silently() -> None:
    progress = Progress(object(), None)

    class Config:
        __slots__: tuple[str, ...] = ()

    progress.attach(Config())
    assert progress.monitor is None


class Driver:
    """libcuda as `find_gpu` calls it."""

    def __init__(self, count: int = 1, broken: str = "") -> None:
        self._count, self._broken = count, broken

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name == self._broken:
                return 999
            if name == "cuDeviceGetCount":
                arguments[0]._obj.value = self._count
            elif name == "cuDeviceGetName":
                arguments[0].value = b"Orin"
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 8, 76: 7}[arguments[1]]
            return 0

        return call


def test_the_driver_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.trt.gpu.ctypes.CDLL", lambda name: Driver())
    gpu = find_gpu()
    assert gpu is not None
    assert (gpu.name, gpu.compute_capability) == ("Orin", "sm_87")


@pytest.mark.parametrize("driver", [Driver(count=0), Driver(broken="cuInit"), None])
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> None:
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr("engines.trt.gpu.ctypes.CDLL", load)
    assert find_gpu() is None

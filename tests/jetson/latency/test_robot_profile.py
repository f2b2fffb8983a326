"""A robot's measurement of itself: clocks held, board recorded, memory of a process."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_board import orin
from fake_orin import FakeOrin
from small_releases import sum_bundle

from engines.trt.device_memory import device_memory
from jetson.board.board_files import read_board_state
from jetson.board.held_clocks import ClocksNotHeld, held_clocks
from jetson.latency.cold_start import ColdStart
from jetson.latency.robot_profile import BoardTime, RobotProfile
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.profile import ProfileRequest
from qvla_export.pipeline.robot.board_profile import RobotProfileRequest, profile_robot
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.errors import ArtifactError


def test_a_board_is_held_for_the_measurement(tiny_policy: OftPolicy, tmp_path: Path) -> None:
    bundle = sum_bundle(tiny_policy, tmp_path / "bundle", table=64, servable=True)
    fake, output = FakeOrin(tmp_path / "orin", is_root=False), tmp_path / "orin.json"
    wanted = ProfileRequest((PolicySource(str(bundle.path), threads=1),), 3, 1)
    request = RobotProfileRequest(wanted, board=fake.board(fake.warm), period_s=0.01)
    with pytest.raises(ClocksNotHeld, match=r"sudo.*--as-is"):
        profile_robot(request, output)
    assert not output.exists()
    fake.is_root, fake.said = True, []
    measured = profile_robot(request, output)
    # Held while it was measured, and given back as they were.
    assert measured.clocks == "held" and measured.board.clocks_locked
    assert [words[1:2] for words in fake.said] == [("--store",), (), ("--restore",)]
    assert not read_board_state(fake.root).clocks_locked
    assert measured.time.samples >= 3 and measured.time.hottest_c["gpu"] > 61.5
    doubts = list(measured.doubts())
    assert doubts[0] == "the board was slowed down: gpu-throttle" and "times" in doubts[-1]
    # A process that holds the policy alone says what it takes; there is no GPU here.
    ((start,),) = measured.comparison.cold_starts.values()
    assert start.resident_bytes is not None and start.resident_bytes > 20e6
    assert start.device_bytes is None
    loaded = RobotProfile.load(output)
    assert loaded.time == measured.time and loaded.clocks == "held" and loaded.gpu == "Orin sm_87"
    assert loaded.comparison.cold_starts == measured.comparison.cold_starts


def test_clocks_are_given_back_whatever_happens(tmp_path: Path) -> None:
    fake = FakeOrin(tmp_path / "orin")
    with pytest.raises(KeyboardInterrupt), held_clocks(fake.read(), run=fake.run):
        assert fake.read().clocks_locked
        raise KeyboardInterrupt
    assert fake.said[-1][1] == "--restore" and not fake.read().clocks_locked
    said = len(fake.said)
    with held_clocks(fake.read(), hold=False, run=fake.run) as clocks:
        assert clocks == "as they were"
    locked = FakeOrin(tmp_path / "locked", locked=True)
    with held_clocks(locked.read(), run=locked.run) as clocks:
        assert clocks == "held before"
    assert not locked.said and len(fake.said) == said


def test_counters_that_rose_are_told(tmp_path: Path) -> None:
    state = read_board_state(orin(tmp_path))
    later = replace(state, throttle_counts={**state.throttle_counts, "oc3": 9})
    assert BoardTime.of((state, later, state)).throttle_counts == {"oc1": 0, "oc3": 2}


@pytest.mark.parametrize("size", [-1, 2.5, "3", True])
def test_memory_is_bytes(size: Any) -> None:
    with pytest.raises(ArtifactError, match="memory of a cold start"):
        ColdStart(1.0, 2.0, size)


class FakeDriver:
    """libcuda.so.1 of a GPU with some memory free, context by context."""

    def __init__(self, free: list[int]) -> None:
        self.free, self.current, self.kept = free, 0, 0

    def cuInit(self, flags: int) -> int:  # CUDA's name
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        self.kept += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: int) -> int:
        self.kept -= 1
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.current += 1
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.current -= 1
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        assert self.current == 1
        ctypes.cast(free, ctypes.POINTER(ctypes.c_size_t))[0] = self.free.pop(0)
        return 0


def test_memory_of_a_gpu_is_the_most_that_was_taken() -> None:
    driver = FakeDriver([1000, 700, 400, 600])
    with device_memory(lambda name: driver) as memory:
        for _ in range(3):
            memory.look()
        assert driver.current == 0 and driver.kept == 1
    assert memory.taken_bytes == 600 and driver.kept == 0


def test_without_a_gpu_nothing_is_claimed() -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    with device_memory(missing) as memory:
        memory.look()
    assert memory.taken_bytes is None

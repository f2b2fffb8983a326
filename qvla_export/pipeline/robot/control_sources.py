"""Where `qvla run` looks and where its commands go."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.robot.control_options import RunOptions
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from jetson.control.loop_clock import LoopClock
    from jetson.control.sinks import Sink
    from jetson.control.sources import Source
    from jetson.serving.policy_contract import PolicyContract


def open_source(
    options: RunOptions, contract: "PolicyContract", clock: "LoopClock", stack: ExitStack
) -> "tuple[Source, Sink]":
    """Return where observations come from and where commands go."""
    from jetson.control.sinks import NullSink, StreamSink
    from jetson.control.sources import SimulatedRobot

    if options.source_kind == "simulator":
        from calibration.benchmarks.metaworld.simulator import Simulator
        from calibration.benchmarks.metaworld.tasks import find_task

        simulator = stack.enter_context(Simulator(find_task(options.place)))
        simulator.reset(options.seed, options.instruction)
        robot = SimulatedRobot(simulator, clock)
        return robot, robot
    if options.source_kind == "ros2":
        from jetson.control.ros2 import RosTopics, open_ros2

        topics = RosTopics(
            contract,
            options.instruction or "",
            tuple(filter(None, options.joints.split(","))),
            tuple(filter(None, options.command_joints.split(","))),
            1.0 / options.rate_hz,
        )
        node = stack.enter_context(closing(open_ros2(topics, clock)))
        return node, node
    sink = StreamSink(sys.stdout) if options.commands == "stdout" else NullSink()
    opener = {"episode": _episode, "camera": _camera, "stdin": _stdin}[options.source_kind]
    return stack.enter_context(closing(opener(options, contract, clock))), sink


def _episode(options: RunOptions, contract: "PolicyContract", clock: "LoopClock") -> "Source":
    from jetson.control.sources import EpisodeSource
    from qvla_export.pipeline.data_source import open_dataset

    root, _, number = options.place.partition("#")
    if not number.isdecimal():
        raise QvlaError(f"say which episode: episode:{root}#0, got {options.source!r}")
    columns = replace(options.columns, instruction=options.instruction)
    dataset = open_dataset(Path(root), columns)
    lengths = dataset.episode_lengths
    if int(number) >= len(lengths):
        raise QvlaError(f"{root} has episodes 0 to {len(lengths) - 1}, got {number}")
    contract.check(dataset.frame(int(number), 0).observation)
    # By frame number: timestamps of data sets are float32, and some start anywhere.
    timestamps = [frame / dataset.fps for frame in range(lengths[int(number)])]

    def load(frame: int) -> Any:
        return dataset.frame(int(number), frame).observation

    return EpisodeSource(timestamps, load, clock, options.instruction)


def _camera(options: RunOptions, contract: "PolicyContract", clock: "LoopClock") -> "Source":
    from jetson.control.camera import CameraSource

    if options.instruction is None:
        raise QvlaError("cameras do not say what to do: give --instruction")
    if contract.state_dim:
        raise QvlaError(
            f"the policy needs a state of {contract.state_dim} numbers, which cameras do not "
            "give; run it behind `qvla serve`, or through jetson.control.ros2, which reads joint "
            "states"
        )
    devices = dict(_camera_pairs(options.place, contract))
    if not {*contract.required_cameras} <= {*devices} <= {*contract.cameras}:
        raise QvlaError(
            f"the policy has cameras {list(contract.cameras)}, got {sorted(devices)}; "
            f"name each: camera:{','.join(f'{name}=/dev/video0' for name in contract.cameras)}"
        )
    openers = {name: _opener(device) for name, device in devices.items()}
    return CameraSource(openers, options.instruction, clock)


def _stdin(options: RunOptions, contract: "PolicyContract", clock: "LoopClock") -> "Source":
    from jetson.control.pipes import PipedSource

    if options.instruction is not None:
        raise QvlaError("over stdin every observation brings its own instruction")
    return PipedSource(sys.stdin.buffer, contract, clock)


def _camera_pairs(place: str, contract: "PolicyContract") -> Iterator[tuple[str, str]]:
    for entry in place.split(","):
        name, equals, device = entry.partition("=")
        yield (name, device) if equals else (contract.cameras[0], entry)


def _opener(device: str) -> Callable[[], Any]:
    from jetson.control.camera import open_camera

    return lambda: open_camera(device)

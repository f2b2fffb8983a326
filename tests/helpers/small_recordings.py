"""Answers to record, and a recorder of them; a process that is killed uses them too."""

from pathlib import Path
from typing import Any

import numpy as np
from echo_policy import OFT

from jetson.board import read_board_state
from jetson.recording.reader import Moment, Recording
from jetson.recording.writer import McapRecorder
from jetson.serving.request_observer import ServedRequest
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation


def served(index: int, side: int = 24) -> ServedRequest:
    generator = np.random.default_rng(index)
    images = {
        camera: generator.integers(0, 256, (side, side + 1, 3), np.uint8) for camera in OFT.cameras
    }
    state = generator.normal(size=8).astype(np.float32)
    actions = generator.normal(size=(4, 7)).astype(np.float32)
    chunk = ActionChunk(actions, actions / 2, {"engine": 1.0 + index})
    return ServedRequest(
        Observation(images, f"push {index} é", state), chunk, {"engine": 1.0, "total": 2}
    )


def recorder(path: Path, **options: Any) -> McapRecorder:
    return McapRecorder(path, OFT, read_board_state, "serve", **options)


def recorded(path: Path, events: list[ServedRequest], **options: Any) -> Recording:
    with recorder(path, **options) as writing:
        for event in events:
            writing.on_request(event)
    return Recording(path)


def same(moment: Moment, event: ServedRequest) -> None:
    assert event.observation is not None and event.chunk is not None and moment.chunk is not None
    assert moment.observation.instruction == event.observation.instruction
    np.testing.assert_array_equal(moment.observation.state, event.observation.state)
    assert list(moment.observation.images) == list(event.observation.images)
    for name, image in event.observation.images.items():
        np.testing.assert_array_equal(moment.observation.images[name], image)
    np.testing.assert_array_equal(moment.chunk.actions, event.chunk.actions)
    np.testing.assert_array_equal(moment.chunk.normalized, event.chunk.normalized)
    assert moment.chunk.timing_ms == event.timing_ms

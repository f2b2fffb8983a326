"""TFRecord files of RLDS episodes, written byte by byte."""

import io
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calibration.sources.rlds.crc32c import masked_crc32c

# Of an episode: column -> numbers of all steps, or byte strings.
Episode = Mapping[str, NDArray[Any] | list[bytes]]


def write_records(folder: Path, episodes: Sequence[Episode], name: str = "train") -> Path:
    """Write a version's folder with one file of episodes; return its data set's folder.

    Args:
        folder: of the data set.
        episodes: of the file.
        name: of the split, or "train.tfrecord-00000-of-00003".
    """
    ending = name if ".tfrecord" in name else f"{name}.tfrecord-00000-of-00001"
    (folder / "1.0.0").mkdir(parents=True, exist_ok=True)
    content = b"".join(_record(_example(episode)) for episode in episodes)
    (folder / f"1.0.0/x-{ending}").write_bytes(content)
    return folder


def droid_episode(steps: int = 3, instruction: bytes = b"put it in") -> dict[str, Any]:
    """Return an episode as DROID names its columns."""
    pictures = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    seen = {"cartesian_position": 6, "joint_position": 7, "gripper_position": 1}
    commands = {**seen, "cartesian_velocity": 6, "joint_velocity": 7, "gripper_velocity": 1}
    of_step: dict[str, Any] = {f"observation/{name}": [jpeg()] * steps for name in pictures}
    for level, (name, size) in enumerate(seen.items(), 1):
        of_step[f"observation/{name}"] = np.full((steps, size), level, np.float32)
    for name, size in commands.items():
        of_step[f"action_dict/{name}"] = np.full((steps, size), -1, np.float32)
    of_step["action"] = np.zeros((steps, 7), np.float32)
    of_step |= {f"language_instruction{end}": [instruction] * steps for end in ("", "_2", "_3")}
    of_step["is_first"] = np.arange(steps) == 0
    episode = {f"steps/{name}": values for name, values in of_step.items()}
    return {**episode, "episode_metadata/file_path": [b"/there/trajectory.h5"]}


def jpeg(side: int = 8) -> bytes:
    """Return a small picture's file."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 90, 10)).save(file, "JPEG")
    return file.getvalue()


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
    return length + next(checksums) + content + next(checksums)


def _example(episode: Episode) -> bytes:
    entries = (
        _field(1, name.encode()) + _field(2, _feature(values)) for name, values in episode.items()
    )
    return _field(1, b"".join(_field(1, entry) for entry in entries))


def _feature(values: NDArray[Any] | list[bytes]) -> bytes:
    if isinstance(values, list):
        return _field(1, b"".join(_field(1, value) for value in values))
    if values.dtype.kind == "f":
        return _field(2, _field(1, values.astype("<f4").tobytes()))
    numbers = values.reshape(-1).astype(np.int64)
    return _field(3, _field(1, b"".join(_varint(int(n) & (1 << 64) - 1) for n in numbers)))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    more, rest = number >> 7, number & 0x7F
    return bytes([rest | 0x80]) + _varint(more) if more else bytes([rest])

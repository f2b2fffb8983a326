"""Small recordings of every format, and the ways in which their files get damaged."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from places import ROOT
from small_datasets import write_small_dataset
from small_recordings import recorder, served

from calibration.sources.image_codec import encode_png
from calibration.sources.lerobot_columns import KeyMap

WRITTEN = ROOT / "tests/data/sources"
# For recordings that do not say what is done.
FOLD = KeyMap(one_instruction="fold the towel")
ODD = (None, float("nan"), float("inf"), -1, 0, 1 << 70, 0.5, "", "x", "9" * 99, [], {}, [[]], True)


@dataclass(frozen=True)
class SmallSource:
    """A recording and what its options say."""

    root: Path
    keys: KeyMap
    # Patterns of the files that say what the data are; all others are data.
    metadata: tuple[str, ...]


def write_calvin(root: Path) -> Path:
    """Write two episodes, two annotated stretches, one file a frame."""
    root.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for frame in range(8):
        np.savez(
            root / f"episode_{frame:07d}.npz",
            rgb_static=generator.integers(0, 256, (12, 12, 3), np.uint8),
            rgb_gripper=generator.integers(0, 256, (6, 6, 3), np.uint8),
            depth_static=generator.normal(size=(12, 12)),
            rel_actions=generator.normal(size=7),
            actions=generator.normal(size=7),
            robot_obs=generator.normal(size=15),
        )
    np.save(root / "ep_start_end_ids.npy", np.array([[0, 3], [4, 7]]))
    rows = [
        {"start": 0, "end": 2, "instruction": "push the blue block"},
        {"start": 4, "end": 7, "instruction": "open the drawer"},
    ]
    (root / "lang_annotations.json").write_text(json.dumps(rows))
    return root


def write_list(root: Path) -> Path:
    """Write `frames.json`: three episodes of two frames, two cameras, state and action."""
    root.mkdir(parents=True)
    generator = np.random.default_rng(1)
    rows = []
    for number in range(6):
        for camera in ("front", "wrist"):
            data = encode_png(generator.integers(0, 256, (10, 10, 3), np.uint8))
            (root / f"{camera}{number}.png").write_bytes(data)
        rows.append(
            {
                "episode": number // 2,
                "instruction": f"do {number // 2}",
                "images": {c: f"{c}{number}.png" for c in ("front", "wrist")},
                "state": generator.normal(size=4).tolist(),
                "action": generator.normal(size=7).tolist(),
            }
        )
    (root / "frames.json").write_text(json.dumps(rows))
    return root


def write_calib(root: Path) -> Path:
    """Write calib.jsonl as the official code reads it."""
    (root / "img").mkdir(parents=True)
    generator = np.random.default_rng(2)
    lines = []
    for number in range(5):
        data = encode_png(generator.integers(0, 256, (10, 10, 3), np.uint8))
        (root / f"img/{number}.png").write_bytes(data)
        lines.append(json.dumps({"text": f"pick up {number}", "image": f"img/{number}.png"}))
    (root / "calib.jsonl").write_text("\n".join(lines) + "\n")
    return root


def write_recordings(root: Path) -> Path:
    """Write two recordings of three observations, each under an instruction of its own."""
    root.mkdir(parents=True)
    for name, first in (("a", 0), ("b", 3)):
        with recorder(root / f"{name}.mcap") as writing:
            for index in range(first, first + 3):
                writing.on_request(served(index, 8))
    return root


def write_version_2(root: Path) -> Path:
    """Write a LeRobotDataset of version 2.1: JSON lines, a file an episode."""
    write_small_dataset(root, [3] * 4, side=8)
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    tasks = pq.read_table(root / "meta/tasks.parquet").to_pylist()
    shutil.rmtree(root / "meta/episodes")
    (root / "meta/tasks.parquet").unlink()
    (root / "data/chunk-000/file-000.parquet").unlink()
    for number in range(4):
        path = root / f"data/chunk-000/episode_{number:06d}.parquet"
        pq.write_table(table.slice(3 * number, 3), path)
    episodes = [{"episode_index": n, "tasks": [], "length": 3} for n in range(4)]
    for name, rows in (("episodes", episodes), ("tasks", tasks)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"meta/{name}.jsonl").write_text(text)
    info = json.loads((root / "meta/info.json").read_text())
    info["codebase_version"] = "v2.1"
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def copied(recording: Path, folder: Path) -> Path:
    """Copy a recording into a folder; return the copy, which a test may change."""
    return Path(shutil.copytree(recording, folder / "data"))


def _copied(name: str) -> Callable[[Path], Path]:
    return lambda root: Path(shutil.copytree(WRITTEN.parent / name, root))


_META = ("meta/*", "meta/**/*")
_WRITERS: dict[str, tuple[Callable[[Path], Path], KeyMap, tuple[str, ...]]] = {
    "lerobot-v3.0": (lambda r: write_small_dataset(r, [3] * 4, side=8), KeyMap(), _META),
    "lerobot-v2.1": (write_version_2, KeyMap(), _META),
    "video-v3.0": (_copied("videos/h264_v30"), KeyMap(), _META),
    "video-v2.1": (_copied("videos/mixed_v21"), KeyMap(), _META),
    "rlds": (_copied("sources/rlds/libero_tiny"), KeyMap(), ("*.json",)),
    "libero": (_copied("sources/libero"), KeyMap(), ("*",)),
    "aloha": (_copied("sources/aloha"), KeyMap(one_instruction="fold it"), ("*",)),
    "calvin": (write_calvin, KeyMap(), ("*.json",)),
    "calvin-whole": (write_calvin, KeyMap(one_instruction="play"), ("*.npy",)),
    "list": (write_list, KeyMap(), ("*.json",)),
    "calib": (write_calib, KeyMap(), ("*.jsonl",)),
    "mcap": (write_recordings, KeyMap(), ("*",)),
}
SOURCES = tuple(_WRITERS)


def write_source(name: str, root: Path) -> SmallSource:
    """Write a recording of a format."""
    write, keys, metadata = _WRITERS[name]
    return SmallSource(write(root), keys, metadata)


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """Return a file's bytes cut, flipped, overwritten, doubled; or odd values in its JSON."""
    if data[:1] in (b"{", b"[") and random.random() < 0.8:
        return _odd_json(data, random)
    mutable = bytearray(data)
    for _ in range(int(random.integers(1, 4))):
        at = int(random.integers(0, len(mutable) + 1))
        length = int(random.integers(1, 9))
        way = int(random.integers(0, 6))
        if way == 0:
            del mutable[at:]
        elif way == 1 and at < len(mutable):
            mutable[at] ^= 1 << int(random.integers(0, 8))
        elif way == 2:
            mutable[at : at + length] = random.bytes(length)
        elif way == 3:
            mutable[at : at + length] = (b"\0", b"\xff")[int(random.integers(0, 2))] * length
        elif way == 4:
            mutable[at:at] = mutable[at : at + 64]
        else:
            del mutable[at : at + length]
    return bytes(mutable)


def _odd_json(data: bytes, random: np.random.Generator) -> bytes:
    lines = data.splitlines()
    whole = len(lines) == 1 or lines[1][:1] != b"{"
    number = 0 if whole else int(random.integers(0, len(lines)))
    value = json.loads(data if whole else lines[number])
    places = list(_places(value))
    path = places[int(random.integers(0, len(places)))]
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if random.random() < 0.2:
        del holder[path[-1]]
    else:
        holder[path[-1]] = ODD[int(random.integers(0, len(ODD)))]
    text = json.dumps(value).encode()
    return text if whole else b"\n".join([*lines[:number], text, *lines[number + 1 :]])


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))

"""How long 128 pictures of AV1 video take beside PyAV's own decoding, printed with -s."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from places import DATA

from calibration.calibration_set import sample_dataset
from calibration.sources.lerobot import LeRobotDataset

EPISODES, SIDE = 64, (480, 640)
# As LeRobot encodes: a key frame every other picture; and one for all of an episode.
OPTIONS = {"g=2": {"g": "2"}, "g=30": {"g": "30"}, "SVT-AV1's": {}}


def write(root: Path, length: int, options: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    """Write 64 episodes of one camera, 16 a file."""
    source = DATA / "videos/write_videos.py"
    spec = importlib.util.spec_from_file_location("write_videos", source)
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    blocks = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    scene = blocks.repeat(8, 0).repeat(8, 1)

    def picture(episode: int, frame: int, camera: str) -> np.ndarray:
        image = np.roll(scene, 3 * frame + 17 * episode, 1)
        image[:, 5 * frame : 5 * frame + 20] = 255
        return image

    patch.setattr(writer, "LENGTHS", (length,) * EPISODES)
    patch.setattr(writer, "FILES", [range(n, n + 16) for n in range(0, EPISODES, 16)])
    patch.setattr(writer, "SIZES", {"top": SIDE})
    patch.setattr(writer, "picture", picture)
    writer.write_v30(root, "libsvtav1", {"crf": "30", "preset": "12", **options}, 30)


def decode_all(root: Path) -> int:
    count = 0
    for path in sorted(root.rglob("*.mp4")):
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                frame.to_ndarray(format="rgb24")
                count += 1
    return count


def seconds_of(work: Callable[[], object]) -> float:
    """Return the shortest of three times."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [2, 30])
def test_128_frames_of_av1(
    length: int, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "av1"
    write(root, length, OPTIONS[options], monkeypatch)
    drawn = sample_dataset(LeRobotDataset(root), 64, 64, 0)
    assert len({o.images["top"].tobytes() for o in (*drawn.observations, *drawn.held_out)}) > 60
    assert decode_all(root) == length * EPISODES
    own = seconds_of(lambda: decode_all(root))
    ours = seconds_of(lambda: sample_dataset(LeRobotDataset(root), 64, 64, 0))
    print(
        f"\n128 of {length * EPISODES} frames, key frames {options}: drawn in {ours:.2f} s, "
        f"PyAV decodes all in {own:.2f} s, ratio {ours / own:.2f}"
    )

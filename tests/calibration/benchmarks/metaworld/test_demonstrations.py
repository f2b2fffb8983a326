"""Recording: clean labels, disturbed paths, and the same dataset after any interruption."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from calibration.benchmarks.metaworld.demonstrations import (
    Recording,
    record_demonstrations,
    record_episode,
)
from calibration.benchmarks.metaworld.disturbance import Disturbance
from calibration.benchmarks.metaworld.experts import Expert
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import CAMERA, CONTROL_HZ, Task, find_task
from calibration.sources.image_codec import decode_png
from calibration.sources.lerobot import LeRobotDataset
from qvla_export.shared.artifacts import sha256_tree
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch, QvlaError

TASKS = [find_task("drawer-close"), find_task("handle-press")]
TINY = Recording(seed=3, image_size=28)
RECORD = """
import sys
from pathlib import Path
from calibration.benchmarks.metaworld.demonstrations import Recording, record_demonstrations
from calibration.benchmarks.metaworld.tasks import find_task
if __name__ == "__main__":
    tasks = [find_task("drawer-close"), find_task("handle-press")]
    record_demonstrations(Path(sys.argv[1]), tasks, 6, Recording(seed=3, image_size=28), workers=2)
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six episodes of each task, recorded without interruption in this process."""
    root = tmp_path_factory.mktemp("recorded") / "demos"
    record_demonstrations(root, TASKS, 6, TINY, workers=1)
    return root


def test_a_recording_is_a_dataset(recorded: Path) -> None:
    dataset = LeRobotDataset(recorded)
    assert len(dataset.episodes) == 12
    assert dataset.fps == CONTROL_HZ
    phrases = {phrase for task in TASKS for phrase in task.instructions}
    assert set(dataset.tasks.values()) <= phrases
    episode = dataset.episode(0)
    assert decode_png(episode.images[CAMERA][0]).shape == (28, 28, 3)
    assert episode.state.shape == episode.action.shape == (len(episode), 4)
    assert not recorded.with_name("demos.staging").exists()


def test_a_killed_recording_goes_on_to_the_same_dataset(recorded: Path, tmp_path: Path) -> None:
    script = tmp_path / "record.py"
    script.write_text(RECORD)
    root = tmp_path / "demos"
    command = [sys.executable, "-W", "ignore", str(script), str(root)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, env=environment)
    staging = tmp_path / "demos.staging"
    while not list(staging.glob("*.npz")):
        assert running.poll() is None
        time.sleep(0.01)
    children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGKILL)
    running.wait()
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert gone and not alive, "workers must not outlive the recording"
    assert not root.exists()
    assert 1 <= len(list(staging.glob("*.npz"))) < 12
    subprocess.run(command, env=environment, check=True)
    assert sha256_tree(root) == sha256_tree(recorded)
    assert not staging.exists()


def test_recording_again_keeps_what_is_there(recorded: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in recorded.rglob("*")}
    record_demonstrations(recorded, TASKS, 6, TINY, workers=1)
    assert {path: path.stat().st_mtime_ns for path in recorded.rglob("*")} == before


def test_a_dataset_of_other_settings_is_not_replaced(recorded: Path) -> None:
    with pytest.raises(ArtifactMismatch, match="recorded with other seed than now asked for"):
        record_demonstrations(recorded, TASKS, 6, replace(TINY, seed=4), workers=1)
    with pytest.raises(ArtifactMismatch, match="other tasks, episodes_per_task than"):
        record_demonstrations(recorded, TASKS[:1], 5, TINY, workers=1)


def test_a_damaged_staged_episode_is_named(tmp_path: Path) -> None:
    root = tmp_path / "demos"
    staging = tmp_path / "demos.staging"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibration.benchmarks.metaworld.demonstrations._load", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            record_demonstrations(root, TASKS[:1], 1, TINY, workers=1)
    (path,) = staging.glob("*.npz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ArtifactError, match=r"drawer-close-00000\.npz is damaged .* record again"):
        record_demonstrations(root, TASKS[:1], 1, TINY, workers=1)
    assert not root.exists()
    path.unlink()
    record_demonstrations(root, TASKS[:1], 1, TINY, workers=1)
    assert len(LeRobotDataset(root).episodes) == 1


def _interrupt(path: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("tasks", "episodes", "workers"), [([], 1, 1), (TASKS, 0, 1), (TASKS, 1, 0)]
)
def test_nothing_to_record_is_an_error(
    tmp_path: Path, tasks: list[Task], episodes: int, workers: int
) -> None:
    with pytest.raises(QvlaError, match="recording needs tasks, episodes and workers"):
        record_demonstrations(tmp_path / "demos", tasks, episodes, TINY, workers)


def test_labels_are_what_the_expert_would_do_there() -> None:
    still = replace(TINY, disturbance=Disturbance(noise=0.0, kicks=0.0))
    expert = Expert(TASKS[0])
    with Simulator(TASKS[0], 28) as simulator:
        episode = record_episode(simulator, still, 0)
        moved = record_episode(simulator, TINY, 0)
        assert simulator.success
    # The same number starts in the same place; the disturbance then leads elsewhere.
    assert episode.state[0].tolist() == moved.state[0].tolist()
    assert episode.state[5].tolist() != moved.state[5].tolist()
    assert np.abs(moved.action).max() <= 1
    assert (moved.action[:, 3] == expert.act(np.zeros(39))[3]).all()


def test_an_expert_that_always_fails_is_reported() -> None:
    hopeless = replace(TASKS[0], steps=2)
    with (
        Simulator(hopeless, 28) as simulator,
        pytest.raises(QvlaError, match="expert of drawer-close failed 50 times"),
    ):
        record_episode(simulator, TINY, 0)


@given(
    seed=st.integers(0, 2**32),
    noise=st.floats(0, 3),
    kicks=st.floats(0, 1),
    action=st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4),
)
def test_disturbed_actions_stay_actions(
    seed: int, noise: float, kicks: float, action: list[float]
) -> None:
    disturb = Disturbance(noise=noise, kicks=kicks).begin(np.random.default_rng(seed))
    label = np.array(action, dtype=np.float32)
    for _ in range(20):
        moved = disturb(label)
        assert moved.dtype == np.float32
        assert np.abs(moved).max() <= 1
        assert moved[3] == label[3]
    assert label.tolist() == np.array(action, dtype=np.float32).tolist()


def test_no_disturbance_changes_nothing() -> None:
    disturb = Disturbance(noise=0.0, kicks=0.0).begin(np.random.default_rng(0))
    label = np.array([0.5, -1.0, 0.25, 1.0], dtype=np.float32)
    assert disturb(label).tolist() == label.tolist()

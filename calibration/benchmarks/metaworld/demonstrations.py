"""Recording scripted experts: disturbed episodes with clean labels, sharded and resumable."""

import io
import json
import logging
import multiprocessing
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.metaworld.disturbance import Disturbance
from calibration.benchmarks.metaworld.experts import Expert
from calibration.benchmarks.metaworld.object_state import OBJECT_STATE
from calibration.benchmarks.metaworld.simulator import IMAGE_SIZE, Simulator
from calibration.benchmarks.metaworld.tasks import CONTROL_HZ, Task
from calibration.benchmarks.workers import leave_with_parent
from calibration.sources.image_codec import encode_png
from calibration.sources.lerobot_writer import Episode, write_dataset
from qvla_export.shared.artifacts import read_json, write_bytes, write_json
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch, QvlaError

log = logging.getLogger(__name__)

ROBOT = "metaworld-sawyer"
# Beside the dataset's own metadata; other readers pass it by.
_SETTINGS = "meta/recording.json"
# Frames kept after success: chunks that start before it still have labels.
_TAIL = 4
_ATTEMPTS = 50
# Episodes one worker records before it takes new ones; a new simulator costs 0.3 s.
_SHARD = 5


@dataclass(frozen=True)
class Recording:
    """What decides a recorded episode, apart from its task and number."""

    seed: int = 0
    image_size: int = IMAGE_SIZE
    # None for each task's own.
    disturbance: Disturbance | None = None


def record_demonstrations(
    root: Path,
    tasks: Sequence[Task],
    episodes_per_task: int,
    recording: Recording | None = None,
    workers: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Record successful episodes of every task as a LeRobotDataset at `root`.

    Finished episodes wait in `<root>.staging`, so that an interrupted recording goes on where it
    stopped and gives the same dataset.  A dataset already recorded with these settings is kept.

    Args:
        root: folder to create.
        tasks: in the order their episodes alternate in.
        episodes_per_task: successful episodes of each.
        recording: what else decides an episode; None for the defaults.
        workers: processes; 1 records in this one.
        on_progress: called with (episodes done, episodes in all).

    Raises:
        QvlaError: there is nothing to record, or an expert keeps failing.
        ArtifactMismatch: `root` or its staging folder was recorded with other settings.
    """
    if not tasks or episodes_per_task < 1 or workers < 1:
        raise QvlaError(
            f"recording needs tasks, episodes and workers, got {len(tasks)} tasks, "
            f"{episodes_per_task} episodes of each and {workers} workers"
        )
    recording = recording or Recording()
    settings = _settings(recording, tasks, episodes_per_task)
    if root.exists():
        _require_settings(root, root / _SETTINGS, settings)
        log.info("%s is recorded already", root)
        return
    staging = root.with_name(root.name + ".staging")
    if staging.exists():
        _require_settings(staging, staging / _SETTINGS, settings)
    write_json(staging / _SETTINGS, settings)
    wanted = [(task, number) for number in range(episodes_per_task) for task in tasks]
    missing = [pair for pair in wanted if not _staging_path(staging, *pair).exists()]
    done = len(wanted) - len(missing)
    for count in _record_all(staging, missing, recording, workers):
        done += count
        if on_progress is not None:
            on_progress(done, len(wanted))
    with write_dataset(root, CONTROL_HZ, ROBOT) as writer:
        for task, number in wanted:
            writer.add(_load(_staging_path(staging, task, number)))
        write_json(writer.root / _SETTINGS, settings)
    shutil.rmtree(staging)


def record_episode(simulator: Simulator, recording: Recording, number: int) -> Episode:
    """Record one successful episode: the same task, settings and number give the same one.

    Raises:
        QvlaError: the expert failed at every attempt.
    """
    task = simulator.task
    for attempt in range(_ATTEMPTS):
        entropy = (recording.seed, zlib.crc32(task.name.encode()), number, attempt)
        if task.camera != OBJECT_STATE:
            # Drawing takes most of the time: what fails is found out without.
            for _ in _play(simulator, recording, entropy):
                pass
            if not simulator.success:
                continue
        episode = _attempt(simulator, recording, entropy)
        if episode is not None:
            return episode
    raise QvlaError(
        f"the expert of {task.name} failed {_ATTEMPTS} times; weaken the disturbance "
        "or narrow the task's placement"
    )


def _attempt(
    simulator: Simulator, recording: Recording, entropy: tuple[int, ...]
) -> Episode | None:
    """Return what an attempt shows; None where it fails."""
    task = simulator.task
    pictures: dict[str, list[bytes]] = {}
    states: list[NDArray[np.float32]] = []
    actions: list[NDArray[np.float32]] = []
    for action in _play(simulator, recording, entropy):
        observation = simulator.observe()
        shown = dict(observation.images)
        if task.hand_camera:
            # Where things are: what a policy may be trained to say, though it never sees it.
            shown[OBJECT_STATE] = simulator.object_state()
        for camera, image in shown.items():
            pictures.setdefault(camera, []).append(encode_png(image))
        states.append(observation.state)
        actions.append(action)
    if not simulator.success:
        return None
    return Episode(simulator.instruction, pictures, np.stack(states), np.stack(actions))


def _play(
    simulator: Simulator, recording: Recording, entropy: tuple[int, ...]
) -> Iterator[NDArray[np.float32]]:
    """Play one attempt; yields each action of the expert before it is made, disturbed."""
    task, random = simulator.task, np.random.default_rng(entropy)
    expert = Expert(task)
    disturb = (recording.disturbance or task.disturbance).begin(random)
    instruction = str(random.choice(task.instructions))
    simulator.reset(int(random.integers(1 << 31)), instruction)
    tail = _TAIL
    while tail > 0:
        action = expert.act(simulator.full_state)
        yield action
        simulator.step(action if simulator.success else disturb(action))
        if simulator.success:
            tail -= 1
        elif simulator.steps >= task.steps:
            return


def _record_all(
    staging: Path,
    missing: Sequence[tuple[Task, int]],
    recording: Recording,
    workers: int,
) -> Iterator[int]:
    """Record the missing episodes; yields how many were added, again and again."""
    shards = list(_shards(missing))
    # A forked child would inherit the parent's OpenGL and thread state.
    spawn = multiprocessing.get_context("spawn")
    if workers <= 1:
        for task, numbers in shards:
            yield _record_shard(staging, task, numbers, recording)
        return
    with ProcessPoolExecutor(workers, spawn, leave_with_parent) as pool:
        jobs = [pool.submit(_record_shard, staging, *shard, recording) for shard in shards]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _shards(missing: Sequence[tuple[Task, int]]) -> Iterator[tuple[Task, list[int]]]:
    by_task: dict[Task, list[int]] = {}
    for task, number in missing:
        by_task.setdefault(task, []).append(number)
    for task, numbers in by_task.items():
        for start in range(0, len(numbers), _SHARD):
            yield task, numbers[start : start + _SHARD]


def _record_shard(staging: Path, task: Task, numbers: Sequence[int], recording: Recording) -> int:
    with Simulator(task, recording.image_size) as simulator:
        for number in numbers:
            episode = record_episode(simulator, recording, number)
            write_bytes(_staging_path(staging, task, number), _pack(episode))
    return len(numbers)


def _staging_path(staging: Path, task: Task, number: int) -> Path:
    return staging / f"{task.name}-{number:05d}.npz"


def _settings(
    recording: Recording, tasks: Sequence[Task], episodes_per_task: int
) -> dict[str, Any]:
    settings: dict[str, Any] = {**asdict(recording)}
    # What a task does without is left out: recordings older than such a thing stay valid.
    settings["tasks"] = [
        {name: value for name, value in asdict(task).items() if value is not False}
        for task in tasks
    ]
    settings["episodes_per_task"] = episodes_per_task
    # As JSON gives them back: lists for tuples.
    result: dict[str, Any] = json.loads(json.dumps(settings))
    return result


def _require_settings(folder: Path, path: Path, settings: dict[str, Any]) -> None:
    found = read_json(path, "recording settings")
    different = [key for key in settings if found.get(key) != settings[key]]
    if different:
        raise ArtifactMismatch(
            f"{folder} was recorded with other {', '.join(different)} than now asked for; "
            "remove it, name another folder, or ask for the same"
        )


def _pack(episode: Episode) -> bytes:
    pictures = [png for camera in episode.images.values() for png in camera]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        instruction=np.array(episode.instruction),
        cameras=np.array(list(episode.images)),
        lengths=np.array([len(png) for png in pictures]),
        pictures=np.frombuffer(b"".join(pictures), dtype=np.uint8),
        state=episode.state,
        action=episode.action,
    )
    return buffer.getvalue()


def _load(path: Path) -> Episode:
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            ends = np.cumsum(arrays["lengths"])
            data = arrays["pictures"].tobytes()
            pairs = zip(ends - arrays["lengths"], ends, strict=True)
            pictures = [data[start:end] for start, end in pairs]
            frames, cameras = len(arrays["state"]), arrays["cameras"]
            images = {
                str(camera): pictures[index * frames : (index + 1) * frames]
                for index, camera in enumerate(cameras)
            }
            instruction = str(arrays["instruction"])
            return Episode(instruction, images, arrays["state"], arrays["action"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is damaged ({error}); remove it and record again") from None

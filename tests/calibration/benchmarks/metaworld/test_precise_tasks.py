"""Tasks where millimetres decide: placements drawn apart, resets that never end, object state."""

from dataclasses import replace

import numpy as np
import pytest

from calibration.benchmarks.metaworld.demonstrations import Recording, record_episode
from calibration.benchmarks.metaworld.experts import Expert, solve
from calibration.benchmarks.metaworld.object_state import OBJECT_STATE, encode_object_state
from calibration.benchmarks.metaworld.shifts import Shift, shifted_instruction
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import (
    HAND_CAMERA,
    PICTURE_TASKS,
    PRECISE_TASKS,
    TASKS,
    Task,
    choose_tasks,
    draw_placement,
    find_task,
    scene_siblings,
)
from calibration.sources.image_codec import decode_png
from qvla_export.shared.errors import QvlaError

ALL = pytest.mark.parametrize("task", PRECISE_TASKS.values(), ids=lambda task: task.name)
# A puck under its own marker, which pick-place and push draw again for ever.
TOUCHING = ((0.0, 0.7, 0.02, 0.0, 0.75, 0.2), (0.0, 0.7, 0.02, 0.0, 0.75, 0.2))


def test_tasks_are_named_or_all_of_a_kind() -> None:
    assert choose_tasks(None) == tuple(TASKS)
    assert choose_tasks("precise") == tuple(PRECISE_TASKS)
    assert choose_tasks("precise-pictures") == tuple(PICTURE_TASKS)
    assert choose_tasks("push, drawer-open") == ("push", "drawer-open")
    assert scene_siblings(find_task("push")) == (find_task("pick-place"),)
    with pytest.raises(QvlaError, match=r"no task is called 'precice'; choose from .*stick-push"):
        choose_tasks("precice")


@ALL
def test_placements_are_wide_and_apart(task: Task) -> None:
    drawn = np.array([draw_placement(task, np.random.default_rng(seed)) for seed in range(400)])
    low, high = task.placement
    assert (drawn >= low).all() and (drawn <= high).all()
    distances = np.linalg.norm(drawn[:, :2] - drawn[:, 3:5], axis=1)
    assert distances.min() >= task.apart > 0
    # Of the object's or the goal's range across the table, nearly all is used.
    span = np.subtract(high, low)
    wide = span >= 0.1
    assert wide.any() and (np.ptp(drawn, axis=0)[wide] >= 0.9 * span[wide]).all()
    again = [draw_placement(task, np.random.default_rng(seed)) for seed in range(3)]
    np.testing.assert_array_equal(drawn[:3], again)


def test_rejection_keeps_the_draws_of_tasks_that_need_none() -> None:
    task = find_task("drawer-open")
    plain = np.random.default_rng(5).uniform(*task.placement)
    np.testing.assert_array_equal(draw_placement(task, np.random.default_rng(5)), plain)


def test_a_task_without_room_is_refused_before_reset() -> None:
    crowded = replace(find_task("push"), placement=TOUCHING)
    with pytest.raises(QvlaError, match=r"no placement of push in 1000 draws had .* 0\.15 m apart"):
        draw_placement(crowded, np.random.default_rng(0))


@ALL
def test_a_reset_that_would_never_return_is_refused(task: Task) -> None:
    low = list(task.placement[0])
    low[3:5] = low[:2]
    heedless = replace(task, placement=(tuple(low), tuple(low)), apart=0.0)
    with Simulator(heedless) as simulator:
        with pytest.raises(QvlaError, match=r"too close on the table, and the task allows 0\.0 m"):
            simulator.reset(0)
        simulator.task = task
        assert simulator.reset(0).state.shape == (4,)


@ALL
def test_the_expert_solves_some_seeds(task: Task) -> None:
    with Simulator(task) as simulator:
        assert sum(solve(simulator, Expert(task), seed) for seed in (1, 3)) >= 1


@pytest.mark.slow
@ALL
def test_the_expert_succeeds_and_is_lost_elsewhere(task: Task) -> None:
    expert = Expert(task)
    middle = np.mean(task.placement, axis=0)[:3]
    with Simulator(task) as simulator:
        seeing = [solve(simulator, expert, seed) for seed in range(40)]
        blind = [solve(simulator, expert, seed, middle) for seed in range(20)]
    assert np.mean(seeing) >= 0.9
    assert np.mean(blind) <= 0.25


def test_one_scene_of_the_puck_and_only_words_tell_what_to_do() -> None:
    tasks = find_task("pick-place"), find_task("push")
    solved = []
    with Simulator(tasks[0]) as lifting, Simulator(tasks[1]) as pushing:
        for seed in range(6):
            here, there = lifting.reset(seed), pushing.reset(seed)
            shown, other = (o.images[OBJECT_STATE].astype(int) for o in (here, there))
            # Push lets the puck come to rest: some micrometres, at most one level of 255.
            assert np.abs(shown - other).max() <= 1
            assert here.state.tolist() == there.state.tolist()
            assert here.instruction != there.instruction
        for told, judged in ((lifting, pushing), (pushing, lifting)):
            expert = Expert(told.task)
            for seed in range(2):
                told.reset(seed)
                judged.reset(seed)
                while not told.done:
                    action = expert.act(told.full_state)
                    told.step(action)
                    judged.step(action)
                assert told.success
                solved.append(judged.success)
    assert not any(solved)


def test_object_state_is_four_vectors_at_four_scales() -> None:
    full_state = np.zeros(39)
    full_state[:3] = (0.0, 0.5, 0.2)
    full_state[4:7] = (0.01, 0.5, 0.17)
    image = encode_object_state(full_state, np.array([0.3, 0.5, 0.2]))
    assert image.shape == (4, 4, 3) and image.dtype == np.uint8
    # Hand to thing, 10 mm and -30 mm, at reaches of 0.6, 0.2, 0.07 and 0.025 m.
    first = image[:2, :2].reshape(4, 3)
    np.testing.assert_array_equal(first[:, 0], np.rint([129.625, 133.875, 145.71428, 178.5]))
    np.testing.assert_array_equal(first[:, 1], 128)
    np.testing.assert_array_equal(first[:, 2], np.rint([121.125, 108.375, 72.857143, 0.0]))
    # No second thing; the goal is 0.3 m away and lies beyond the finer three.
    np.testing.assert_array_equal(image[:2, 2:], 128)
    np.testing.assert_array_equal(
        image[2:, :2].reshape(4, 3)[:, 0], np.rint([191.25, 255, 255, 255])
    )
    np.testing.assert_array_equal(
        image[2:, 2:].reshape(4, 3)[0], np.rint([189.125, 127.5, 133.875])
    )


def test_a_demonstration_is_recorded_without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    task = find_task("assembly")
    with Simulator(task) as simulator:
        monkeypatch.setattr(simulator, "render", None)  # drawing would raise
        episode = record_episode(simulator, Recording(seed=1), 0)
    assert list(episode.images) == [OBJECT_STATE]
    assert decode_png(episode.images[OBJECT_STATE][0]).shape == (4, 4, 3)
    assert len(episode) == len(episode.action) == len(episode.state)


@pytest.mark.parametrize("name", ["push", "stick-push"])
def test_pictures_of_a_task_are_of_the_same_episode(name: str) -> None:
    blind, seen = find_task(name), find_task(f"{name}-pictures")
    with Simulator(blind) as numbers, Simulator(seen, 28) as pictures:
        told, shown = numbers.reset(4), pictures.reset(4)
        assert list(shown.images) == ["image", HAND_CAMERA]
        assert {image.shape for image in shown.images.values()} == {(28, 28, 3)}
        assert told.state.tolist() == shown.state.tolist()
        assert told.instruction == shown.instruction
        np.testing.assert_array_equal(told.images[OBJECT_STATE], pictures.object_state())
        # What stands still looks the same from the hand only as long as the hand stands still.
        before = pictures.observe().images
        np.testing.assert_array_equal(before[HAND_CAMERA], shown.images[HAND_CAMERA])
        for _ in range(8):
            pictures.step(np.array([1.0, 0.0, 0.0, -1.0], np.float32))
        after = pictures.observe().images
        changed = {n: np.abs(after[n].astype(int) - before[n]).mean() for n in after}
        assert changed[HAND_CAMERA] > 2 * changed["image"] > 0
    words = shifted_instruction(Shift("instruction", 3), seen, seen.instruction, 4)
    assert words == shifted_instruction(Shift("instruction", 3), blind, blind.instruction, 4)


def test_a_marker_stands_where_the_goal_is() -> None:
    task = find_task("pick-place-pictures")
    siblings = [sibling.name for sibling in scene_siblings(task)]
    assert siblings == ["push-pictures"] and not find_task("assembly-pictures").marker
    columns = []
    with Simulator(task) as simulator:
        for goal in (-0.15, 0.15):
            x = (goal, 0.8, 0.2)
            object_and_goal = (0.0, 0.6, 0.02, *x)
            simulator.task = replace(task, placement=(object_and_goal, object_and_goal))
            image = simulator.reset(0).images["image"].astype(int)
            # Yellow: more red and green than blue.
            yellow = (image[:, :, :2].min(axis=2) - image[:, :, 2]) > 90
            assert 4 <= yellow.sum() <= 200
            columns.append(np.flatnonzero(yellow.any(axis=0)).mean())
    assert columns[1] - columns[0] > 10


def test_each_camera_has_noise_of_its_own() -> None:
    with Simulator(find_task("push-pictures"), 28) as simulator:
        clean = simulator.reset(1).images
        noisy = simulator.reset(1, shift=Shift("noise", 2)).images
        again = simulator.reset(1, shift=Shift("noise", 2)).images
    noise = {name: noisy[name].astype(int) - clean[name] for name in clean}
    for name, values in noise.items():
        assert 4 < values.std() < 12
        np.testing.assert_array_equal(noisy[name], again[name])
    assert not np.array_equal(noise["image"], noise[HAND_CAMERA])


def test_a_demonstration_in_pictures_also_says_where_things_are() -> None:
    with Simulator(find_task("push-pictures"), 28) as simulator:
        episode = record_episode(simulator, Recording(seed=1, image_size=28), 0)
    with Simulator(find_task("push-pictures"), 28) as simulator:
        again = record_episode(simulator, Recording(seed=1, image_size=28), 0)
    assert list(episode.images) == ["image", HAND_CAMERA, OBJECT_STATE]
    assert {len(pictures) for pictures in episode.images.values()} == {len(episode)}
    assert episode.images == again.images
    np.testing.assert_array_equal(episode.action, again.action)
    assert decode_png(episode.images[OBJECT_STATE][0]).shape == (4, 4, 3)

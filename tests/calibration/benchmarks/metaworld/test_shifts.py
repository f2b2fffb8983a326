"""Shifts change what they name and nothing else, by seed and grade, for every policy alike."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from calibration.benchmarks.evaluation import EpisodeResult, Evaluation, RolloutConfig
from calibration.benchmarks.metaworld.object_state import encode_object_state
from calibration.benchmarks.metaworld.shifts import (
    GRADES,
    KINDS,
    Shift,
    applies_to,
    parse_shift,
    shift_of,
    shifted_instruction,
    shifted_placement,
    shifted_start,
)
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import (
    PRECISE_TASKS,
    TASKS,
    Task,
    draw_placement,
    find_task,
)
from qvla_export.shared.errors import QvlaError

SEED = 11
# What of an episode's beginning a shift may change: of an object state, and of pictures.
CHANGES = {
    "start": {"hand", "image"},
    "placement": {"placement", "image"},
    "instruction": {"instruction"},
    "noise": {"image"},
    "distractors": {"image"},
    "camera": {"image"},
    "light": {"image"},
    "colour": {"image"},
}


@dataclass(frozen=True)
class Beginning:
    """What can be told of an episode's first moment."""

    placement: tuple[float, ...]
    hand: tuple[float, ...]
    instruction: str
    image: bytes

    def differences(self, other: "Beginning") -> set[str]:
        return {name for name in vars(self) if getattr(self, name) != getattr(other, name)}


def begin(simulator: Simulator, shift: Shift | None, seed: int = SEED) -> Beginning:
    seen = simulator.reset(seed, shift=shift)
    (image,) = seen.images.values()
    hand = tuple(np.round(simulator.hand, 9).tolist())
    return Beginning(
        tuple(simulator.placement.tolist()), hand, simulator.instruction, image.tobytes()
    )


@pytest.fixture(scope="module", params=["push", "drawer-open"])
def simulator(request: pytest.FixtureRequest) -> Iterator[Simulator]:
    with Simulator(find_task(request.param)) as opened:
        yield opened


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_changes_what_it_names(simulator: Simulator, kind: str) -> None:
    if not applies_to(kind, simulator.task):
        with pytest.raises(QvlaError, match="cannot be shifted in push"):
            shift_of(f"{kind}:1", simulator.task, SEED)
        return
    nominal = begin(simulator, None)
    for grade in GRADES:
        shifted = begin(simulator, Shift(kind, grade))
        assert shifted.differences(nominal) == CHANGES[kind], (kind, grade)
        assert begin(simulator, Shift(kind, grade)) == shifted, "equal seeds, equal episodes"
    # Nothing of it stays for the next episode.
    assert begin(simulator, None) == nominal
    other = begin(simulator, None, SEED + 1)
    assert begin(simulator, Shift(kind, 3), SEED + 1).differences(other) == CHANGES[kind]


@pytest.mark.parametrize("task", PRECISE_TASKS.values(), ids=lambda task: task.name)
def test_the_hand_starts_further_off_and_objects_lie_further_out(task: Task) -> None:
    low, high = (np.array(corner) for corner in task.placement)
    wide = high - low > 1e-9
    hand = np.mean(task.hand, axis=0)
    for seed in range(50):
        placement = draw_placement(task, np.random.default_rng(seed))
        away, out = [], []
        for grade in GRADES:
            start = shifted_start(Shift("start", grade), hand, seed)
            away.append(np.linalg.norm(start - hand))
            edge = shifted_placement(Shift("placement", grade), task, placement, seed)
            assert np.linalg.norm(edge[:2] - edge[3:5]) >= task.apart
            share = np.abs(edge - (low + high) / 2)[wide] / ((high - low) / 2)[wide]
            out.append(share.max())
            assert share.max() <= 1.1 + 1e-9
        assert away == sorted(away)
        assert away[0] == pytest.approx(0.03)
        assert out[0] >= 0.7 - 1e-9 and out[1] >= 0.9 - 1e-9 and out[2] >= 1.0 - 1e-9


def test_noise_is_of_the_episode_and_of_each_look(simulator: Simulator) -> None:
    standing = np.zeros(4, np.float32)
    shift = Shift("noise", 2)
    begin(simulator, shift)
    looks = []
    for _ in range(2):
        seen = [next(iter(simulator.observe().images.values())) for _ in range(2)]
        assert seen[0].tobytes() == seen[1].tobytes(), "a look can be repeated"
        looks.append(seen[0])
        simulator.step(standing)
    assert looks[0].tobytes() != looks[1].tobytes()


def test_an_object_state_is_off_by_millimetres() -> None:
    with Simulator(find_task("push")) as simulator:
        simulator.reset(SEED, shift=Shift("noise", 3))
        full_state, goal = simulator._shown_positions()
        off = np.concatenate([full_state[4:7] - simulator.full_state[4:7], goal])
        off[3:] -= simulator.placement[3:6]
        assert 0.0005 < np.abs(off).mean() < 0.03
        assert not full_state[11:14].any(), "what is not there stays away"
        assert full_state[:4].tolist() == simulator.full_state[:4].tolist()
        simulator.reset(SEED, shift=Shift("distractors", 2))
        full_state, goal = simulator._shown_positions()
        assert np.linalg.norm(full_state[11:14] - simulator.placement[:3]) == pytest.approx(0.15)
        assert encode_object_state(full_state, goal).shape == (4, 4, 3)


def test_every_task_has_other_words() -> None:
    for task in (*TASKS.values(), *PRECISE_TASKS.values()):
        said = set()
        for grade in GRADES:
            words = shifted_instruction(Shift("instruction", grade), task, task.instruction, SEED)
            said.add(words)
            assert (words in task.instructions) == (grade == 1)
            assert words != task.instruction
            sibling = shifted_instruction(Shift("instruction", grade), task, "do it", SEED)
            assert sibling == "do it", "another instruction than the task's own is left alone"
        assert len(said) == 3


def test_mixed_takes_all_that_apply_in_turn() -> None:
    push, stick, drawer = find_task("push"), find_task("stick-push"), find_task("drawer-open")
    assert {str(shift_of("mixed:2", drawer, seed)) for seed in range(8)} == {
        f"{kind}:2" for kind in KINDS
    }
    assert {str(shift_of("mixed:1", push, seed)) for seed in range(5)} == {
        "start:1", "placement:1", "instruction:1", "noise:1", "distractors:1"
    }  # fmt: skip
    assert "distractors:3" not in {str(shift_of("mixed:3", stick, seed)) for seed in range(8)}
    assert shift_of("none", push, 0) is None


@pytest.mark.parametrize("text", ["fog:1", "noise", "noise:0", "noise:4", "noise:x", "mixed:", ""])
def test_what_is_no_shift_is_refused(text: str) -> None:
    with pytest.raises(QvlaError, match="a shift is NAME:GRADE, with a name of start, placement"):
        RolloutConfig(("push",), 1, shift=text)
    assert parse_shift("light:3") == ("light", 3)


def test_tasks_that_a_shift_does_not_fit_are_left_out() -> None:
    config = RolloutConfig(("push", "drawer-open"), 1, shift="light:1")
    assert config.runnable().tasks == ("drawer-open",)
    with pytest.raises(QvlaError, match="light:1 cannot be seen in push"):
        RolloutConfig(("push",), 1, shift="light:1").runnable()


def test_success_is_told_by_shift() -> None:
    config = RolloutConfig(("stick-push",), 4, 0, shift="mixed:1")
    rows = tuple(EpisodeResult("stick-push", i, i == 2, 9, ()) for i in range(4))
    shares = Evaluation("p", "d", config, rows, {}).success_by_shift()
    assert shares == {"instruction:1": 1.0, "noise:1": 0.0, "placement:1": 0.0, "start:1": 0.0}
    plain = RolloutConfig(("stick-push",), 4, 0)
    assert Evaluation("p", "d", plain, rows, {}).success_by_shift() == {}

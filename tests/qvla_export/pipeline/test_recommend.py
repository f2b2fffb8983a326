"""Which setting is recommended: bounds, the choice, what comes next."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engines.targets import TARGETS
from qvla_export.cli.app import app
from qvla_export.pipeline.recommend.bounds import Bound, form_bounds, require_units
from qvla_export.pipeline.recommend.next_commands import next_commands, with_settings
from qvla_export.pipeline.recommend.open_loop import (
    Actions,
    groups_no_better_than_a_constant,
    open_loop_error,
)
from qvla_export.pipeline.recommend.recommendation import (
    ActionTime,
    Candidate,
    choose,
    exceeded,
)
from qvla_export.pipeline.recommend.sentences import choice_sentences, doubts
from qvla_export.pipeline.recommend.tolerance import Tolerance
from qvla_export.shared.action_space import ActionLabels, ActionSpace, action_space
from qvla_export.shared.errors import QvlaError

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
COMMAND = "qvla deploy --policy mine --settings float,w4 --run runs/mine"


def space_in(mm: float | None = 1000.0, deg: float | None = 57.3) -> ActionSpace:
    return action_space(7, np.ones(7, bool), (ActionLabels("the test", NAMES, mm, deg),))


def judged(
    noise: Sequence[float], seed: int = 0, demonstrated: bool = True
) -> tuple[Actions, list[Candidate]]:
    """Return a float policy and candidates of growing size whose actions are so noisy."""
    random = np.random.default_rng(seed)
    target: NDArray[np.float64] = random.normal(0, 0.3, (9, 4, 7))
    own = target + random.normal(0, 0.1, target.shape)
    actions = Actions(own, target if demonstrated else None, np.ones(7))
    candidates = [
        Candidate(
            f"w{i}",
            False,
            "digest",
            1000 + i,
            open_loop_error(space_in(), actions, own + random.normal(0, sigma, own.shape)),
        )
        for i, sigma in enumerate(noise)
    ]
    plain = Candidate("float", True, "digest", 1, open_loop_error(space_in(), actions, own))
    return actions, [plain, *candidates]


def bounds_of(actions: Actions, tolerance: Tolerance | None = None) -> tuple[Bound, ...]:
    error = open_loop_error(space_in(), actions, actions.float_policy)
    return form_bounds(space_in(), error, tolerance or Tolerance(), "nothing was recorded")


def test_the_default_bound_is_a_tenth_of_the_float_policys_own_median_error() -> None:
    actions, _ = judged(())
    assert actions.demonstrated is not None
    apart = actions.float_policy - actions.demonstrated
    expected = {
        "translation": 100 * np.median(np.linalg.norm(apart[..., :3], axis=-1)),
        "rotation": 5.73 * np.median(np.linalg.norm(apart[..., 3:6], axis=-1)),
        "gripper": 0.1 * np.median(abs(apart[..., 6])),
    }
    found = {bound.group: bound for bound in bounds_of(actions)}
    assert list(found) == list(expected)
    for group, value in expected.items():
        assert found[group].value == pytest.approx(value)  # type: ignore[index]
        assert found[group].quantile == "median"  # type: ignore[index]


_NOISE = st.lists(st.sampled_from([0.0, 1e-4, 1e-3, 5e-3, 0.02, 0.1]), min_size=1, max_size=5)
_AMOUNT = st.floats(1e-3, 500)


@settings(max_examples=40)
@given(_NOISE, st.integers(0, 50), _AMOUNT, _AMOUNT, _AMOUNT, st.floats(1, 10), st.booleans())
def test_nothing_over_a_bound_is_recommended_and_a_wider_one_never_costs_bytes(
    noise: list[float], seed: int, mm: float, deg: float, grip: float, times: float, recorded: bool
) -> None:
    actions, candidates = judged(noise, seed, recorded)
    sizes = []
    for factor in (1.0, times):
        tolerance = Tolerance(factor * mm, factor * deg, factor * grip / 100)
        bounds = bounds_of(actions, tolerance)
        chosen = choose(candidates, bounds)
        sizes.append(np.inf if chosen is None else chosen.bundle_bytes)
        fitting = [c for c in candidates[1:] if not exceeded(c, bounds)]
        assert (chosen is None) == (not fitting)
        if chosen is None:
            continue
        assert not chosen.is_float
        assert chosen.bundle_bytes == min(c.bundle_bytes for c in fitting)
        for bound in bounds:
            error = chosen.error.groups[bound.group]
            assert bound.value is not None and error.shift.p90 <= bound.value
            assert error.growth is None or error.growth.p90 <= bound.value
    assert sizes[1] <= sizes[0]


@settings(max_examples=40)
@given(_NOISE, st.integers(0, 50))
def test_by_default_too_the_choice_is_under_a_tenth_by_either_reading(
    noise: list[float], seed: int
) -> None:
    actions, candidates = judged(noise, seed)
    assert actions.demonstrated is not None
    chosen = choose(candidates, bounds_of(actions))
    own = open_loop_error(space_in(), actions, actions.float_policy).groups
    if chosen is None:
        assert all(sigma > 1e-4 for sigma in noise)
        return
    for group, error in chosen.error.groups.items():
        allowed, plain = own[group].error, own[group].error
        assert allowed is not None and plain is not None and error.error is not None
        assert error.shift.median <= 0.1 * allowed.median
        assert error.error.median - plain.median <= 0.1 * allowed.median


def test_without_demonstrated_actions_a_tolerance_is_asked_for() -> None:
    actions, candidates = judged([1e-4], demonstrated=False)
    bounds = bounds_of(actions)
    assert choose(candidates, bounds) is None  # whatever it does
    text = " ".join(choice_sentences(None, candidates, bounds, COMMAND))
    assert "no bound for translation and rotation and gripper" in text
    assert "nothing was recorded" in text and "--tolerance-mm" in text
    # A tolerance of some groups is not enough for the others.
    assert choose(candidates, bounds_of(actions, Tolerance(tolerance_mm=5.0))) is None
    everything = Tolerance(tolerance_mm=5.0, tolerance_deg=5.0, tolerance_gripper=0.1)
    assert choose(candidates, bounds_of(actions, everything)) is candidates[1]


def test_what_was_demonstrated_in_part_is_judged_in_part() -> None:
    actions, _ = judged(())
    assert actions.demonstrated is not None
    target = actions.demonstrated.copy()
    target[3:, 2:] = np.nan
    target[5] = np.nan
    partly = replace(actions, demonstrated=target)
    error = open_loop_error(space_in(), partly, actions.float_policy)
    assert (error.steps, error.demonstrated_steps) == (36, 12 + 5 * 2)
    nothing = replace(actions, demonstrated=np.full_like(target, np.nan))
    assert open_loop_error(space_in(), nothing, target).groups["gripper"].error is None


def test_if_none_fits_it_says_which_is_nearest_and_what_to_try() -> None:
    actions, candidates = judged([0.3, 0.1])
    bounds = bounds_of(actions)
    assert choose(candidates, bounds) is None
    first, more, state = choice_sentences(None, candidates, bounds, COMMAND)
    assert "No setting" in first and "nearest is w1" in first and "% of the bound" in first
    line = "qvla deploy --policy mine --run runs/mine --settings float,w8"
    assert more == f"More bits may do: {line}."
    assert "--tolerance-mm" in state


def test_room_below_the_bounds_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actions, (plain, candidate) = judged([1e-4])
    candidate = replace(candidate, setting="w4")
    bounds = bounds_of(actions)
    sentences = choice_sentences(candidate, (plain, candidate), bounds, COMMAND)
    assert sentences[0].startswith("Take w4: the smallest setting under every bound.")
    assert sentences[-1].endswith("--settings float,w3.")
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    parse(sentences[-1].partition("may do: ")[2].removesuffix("."))


def test_a_choice_that_is_slower_than_float_says_so() -> None:
    actions, (plain, candidate) = judged([1e-4])
    bounds = bounds_of(actions)

    def said(own_ms: float, measured: bool) -> str:
        times = (ActionTime(ms, measured, "here", ms, ms) for ms in (10.0, own_ms))
        timed = [replace(c, time=t) for c, t in zip((plain, candidate), times, strict=True)]
        return " ".join(choice_sentences(timed[1], timed, bounds, COMMAND))

    assert "slower than float" in said(12.0, True) and "qvla tune" in said(12.0, True)
    assert "slower" not in said(9.0, True) and "slower" not in said(12.0, False)


def test_a_gripper_that_flips_and_a_recording_of_something_else_are_doubted() -> None:
    actions, (plain, candidate) = judged([1e-4])
    assert not groups_no_better_than_a_constant(space_in(), actions)
    assert not doubts(space_in(), (), bounds_of(actions), candidate)
    turned = replace(actions, demonstrated=-actions.float_policy)
    strange = groups_no_better_than_a_constant(space_in(), turned)
    assert strange == ("translation", "rotation", "gripper")
    said = doubts(space_in(), strange, bounds_of(turned), plain)
    assert len(said) == 3 and "another frame, unit or sign" in said[0]
    # A stated bound does not rest on the recording.
    tolerance = Tolerance(tolerance_mm=1.0, tolerance_deg=1.0, tolerance_gripper=0.1)
    assert not doubts(space_in(), strange, bounds_of(turned, tolerance), plain)
    flipped = actions.float_policy.copy()
    flipped[0, :2, 6] += 1.2
    error = open_loop_error(space_in(), actions, flipped)
    assert error.groups["gripper"].flips == pytest.approx(2 / 36)
    assert "5.6 %" in doubts(space_in(), (), (), replace(candidate, error=error))[0]


@pytest.mark.parametrize(
    ("tolerance", "space", "words"),
    [
        (
            Tolerance(tolerance_mm=1.0),
            space_in(mm=None),
            "--unit-mm .1000 for metres",
        ),
        (Tolerance(tolerance_deg=1.0), space_in(deg=None), "--unit-deg .57.2958 for radians"),
        (Tolerance(tolerance_mm=1.0), action_space(2, np.ones(2, bool), ()), "--action-names"),
        (
            Tolerance(tolerance_gripper=1.0),
            action_space(1, np.ones(1, bool), (ActionLabels("it", ("x",)),)),
            "bounds gripper, of which the action has none: the action's numbers are x .it.",
        ),
    ],
)
def test_a_tolerance_in_unknown_units_is_refused(
    tolerance: Tolerance, space: ActionSpace, words: str
) -> None:
    with pytest.raises(QvlaError, match=words):
        require_units(space, tolerance)


def test_a_stated_unit_is_enough() -> None:
    stated = Tolerance(tolerance_mm=1.0, unit_mm=50.0)
    labels = (stated.labels, ActionLabels("the data", NAMES))
    require_units(action_space(7, np.ones(7, bool), labels), stated)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tolerance_is_a_number_above_zero(value: float) -> None:
    with pytest.raises(QvlaError, match="--tolerance-mm must be a number above 0"):
        Tolerance(tolerance_mm=value)


def parse(line: str) -> None:
    """Parse a line as the command does; callbacks look whether paths are there."""
    program, name, *words = shlex.split(line)
    assert program == "qvla"
    group = typer.main.get_command(app)
    group.commands[name].make_context(name, words)  # type: ignore[attr-defined]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("rsync", [True, False])
def test_the_next_commands_work_where_they_are_to_be_typed(
    name: str, native: bool, rsync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda program: program if rsync else None)
    bundle = Path("runs/my run/settings/w2.5-set0.8/bundle")
    bundle.mkdir(parents=True)
    commands = next_commands(TARGETS[name], "w2.5-set0.8", bundle, native)
    purposes = [shlex.split(command.line)[:2] for command in commands]
    tools = [words[1] if words[0] == "qvla" else "copy" for words in purposes]
    engines = ["build"] * (name in ("orin-jp7", "orin-jp6", "rtx4070"))
    if native:
        assert tools == [*engines, "verify", "serve", "copy"]
    else:
        assert tools == ["check", "copy", *engines, "verify", "serve"]
    for command in commands:
        words = shlex.split(command.line)
        if words[0] != "qvla":
            assert words[0] == ("rsync" if rsync else "scp")
            assert Path(words[-2]) == bundle and words[-1].startswith("ROBOT:w2.5-set0.8")
            Path(words[-1].partition(":")[2]).mkdir()
            continue
        # Nothing on this machine runs the target's engines where it is not native.
        assert command.where == ("here" if native or words[1] == "check" else "robot")
        parse(command.line)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("qvla deploy", "qvla deploy --settings float,w8"),
        ("qvla deploy --settings w2 --run 'a b'", "qvla deploy --run 'a b' --settings float,w8"),
        ("qvla deploy --settings=w2 --seed 1", "qvla deploy --seed 1 --settings float,w8"),
        ("", None),
        ("qvla calibrate", None),
    ],
)
def test_a_command_with_other_settings(command: str, expected: str | None) -> None:
    assert with_settings(command, ("float", "w8")) == expected

"""Names, groups and units of an action's numbers, and differences in them."""

import numpy as np
import pytest

from qvla_export.shared.action_space import DEGREES, ActionLabels, action_space, group_of
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.policy_interface import INTERFACES

ALL = np.ones(7, bool)


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("translation", "x dx delta_x ee_pos_x left_x EEPosX eef.z"),
        ("rotation", "roll dyaw right_pitch rx drz axis_angle_x"),
        (
            "joints",
            "left_waist left_forearm_roll shoulder_pan.pos wrist_roll.pos joint_0 panda_joint7 j1",
        ),
        ("gripper", "gripper gripper.pos left_gripper right_finger"),
        ("other", "motor_3 qx linear.vel terminate"),
    ],
)
def test_names_say_what_moves(group: str, names: str) -> None:
    assert {name: group_of(name) for name in names.split()} == dict.fromkeys(names.split(), group)


def test_the_first_that_says_it_decides() -> None:
    labels = (
        ActionLabels("the user", unit_mm=2.0),
        ActionLabels("the file", (*tuple("xyzabc"), "gripper"), 3.0, 4.0),
        ActionLabels("the data", ("a",) * 7),
    )
    space = action_space(7, ALL, labels)
    assert space.names == ("x", "y", "z", "a", "b", "c", "gripper")
    assert (space.unit_mm, space.unit_deg) == (2.0, 4.0)
    assert (space.names_source, space.units_source) == ("the file", "the user, the file")
    assert space.present() == ("translation", "gripper", "other")


def test_who_names_too_few_is_named() -> None:
    with pytest.raises(QvlaError, match="have 7 numbers, --action-names names 2: x, y"):
        action_space(7, ALL, (ActionLabels("--action-names", ("x", "y")),))


def test_only_openvlas_seven_are_assumed_and_said_to_be() -> None:
    mask = np.array([True] * 6 + [False])
    space = action_space(7, mask, ())
    assert space.names[0] == "x" and space.names[-1] == "gripper"
    assert space.names_source.startswith("assumed")
    for dim, other in ((7, ALL), (4, mask[:4])):
        unnamed = action_space(dim, other, ())
        assert unnamed.names[0] == "dimension 0" and set(unnamed.groups) == {"other"}
        assert unnamed.unit("other") == ("units", 1.0)


@pytest.mark.parametrize(
    ("preset", "units"),
    [
        ("libero", {"translation": ("mm", 50.0), "rotation": ("deg", 0.5 * DEGREES)}),
        ("bridge", {"translation": ("mm", 1000.0), "rotation": ("deg", DEGREES)}),
        ("aloha", {"joints": ("deg", DEGREES), "gripper": ("units", 1.0)}),
    ],
)
def test_presets_have_names_and_units(preset: str, units: dict[str, tuple[str, float]]) -> None:
    known = INTERFACES[preset]
    label = ActionLabels(preset, known.action_names, known.action_unit_mm, known.action_unit_deg)
    space = action_space(known.action_dim, np.ones(known.action_dim, bool), (label,))
    assert {group: space.unit(group) for group in space.present()} == {  # type: ignore[comparison-overlap]
        "gripper": ("units", 1.0)
    } | units


def test_differences_are_distances_in_the_robots_units() -> None:
    names = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    space = action_space(7, ALL, (ActionLabels("", names, 1000.0, DEGREES),))
    a = np.zeros((2, 7))
    b = np.array([[3e-3, 4e-3, 0, 0, 0, 0, -0.5], [0, 0, 0, np.pi - 0.01, 0, 0, 0]])
    a[1, 3] = 0.01 - np.pi
    np.testing.assert_allclose(space.differences("translation", a, b), [5, 0], atol=1e-9)
    np.testing.assert_allclose(space.differences("rotation", a, b), [0, 0.02 * DEGREES], atol=1e-9)
    np.testing.assert_allclose(space.differences("gripper", a, b), [0.5, 0])


def test_of_two_arms_the_larger_distance_counts() -> None:
    names = tuple(f"{side}_{axis}" for side in ("left", "right") for axis in "xyz")
    space = action_space(6, np.ones(6, bool), (ActionLabels("", names, 1.0),))
    b = np.array([3.0, 4.0, 0.0, 0.0, 0.0, 6.0])
    assert space.differences("translation", np.zeros(6), b) == 6.0


def test_joints_are_compared_one_by_one() -> None:
    space = action_space(3, np.ones(3, bool), (ActionLabels("", ("j1", "j2", "j3")),))
    assert space.differences("joints", np.zeros(3), np.array([1.0, -2.0, 0.5])) == 2.0

"""Joints of an ALOHA and relative actions of openpi's policies, as openpi's own transforms do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from openvla_cases import copied
from pi_cases import SLOTS, pi_observations, write_tiny_pi
from places import DATA

from engines.base import Engine
from jetson.guarded_policy import guarded
from jetson.policy import EnginePolicy
from qvla_export.pipeline.robot.control_loop import run_policy
from qvla_export.pipeline.robot.control_options import RunOptions
from qvla_export.policies.families import describe_checkpoint, load_policy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError, InvalidObservation, QvlaError
from qvla_export.shared.observation import Observation
from qvla_export.shared.processor import Processor
from qvla_export.shared.processor_json import processor_from_json, processor_to_json

GOLDEN = DATA / "oracles" / "aloha_joints" / "aloha_joints.npz"
# openpi's mask of an ALOHA: all joints, no gripper.
JOINTS = [*range(6), *range(7, 13)]
WAYS = {"mean_std": False, "quantiles": True}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, golden: dict[str, Any]) -> dict[str, Path]:
    """pi0 and pi0.5 of an ALOHA, with upstream's statistics."""
    found = {}
    for way, adaptive in WAYS.items():
        folder = write_tiny_pi(
            tmp_path_factory.mktemp("aloha") / way,
            adaptive,
            cameras=SLOTS[:1],
            action_dim=14,
            state_dim=14,
            horizon=3,
        )
        table = {
            part: {n: golden[f"{part}_{n}"].tolist() for n in ("mean", "std", "q01", "q99")}
            for part in ("state", "actions")
        }
        assets = folder / "assets" / "tiny" / "norm_stats.json"
        assets.write_text(json.dumps({"norm_stats": table}))
        found[way] = folder
    return found


def stated(folder: Path, to: Path, **fields: object) -> Path:
    found = copied(folder, to)
    path = found / "qvla_policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return found


@pytest.fixture(scope="module")
def processors(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Processor]:
    kinds: dict[str, list[int]] = {"absolute": [], "relative": JOINTS}
    return {
        (way, kind): load_policy(
            stated(
                folder,
                tmp_path_factory.mktemp("stated") / kind,
                adapt_to_pi=True,
                relative_actions=numbers,
            )
        ).processor
        for way, folder in folders.items()
        for kind, numbers in kinds.items()
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_states_and_actions_are_openpi_s(
    way: str,
    kind: str,
    processors: dict[tuple[str, str], Processor],
    golden: dict[str, np.ndarray],
) -> None:
    loaded = processors[way, kind]
    stored = json.loads(json.dumps(processor_to_json(loaded)))
    for processor in (loaded, processor_from_json(stored, loaded.tokenizer)):
        rows = zip(golden["states"], golden["normalized_actions"], strict=True)
        for row, (state, normalized) in enumerate(rows):
            seen = Observation({SLOTS[0]: np.zeros((8, 8, 3), np.uint8)}, "go", state)
            expected = golden[f"normalized_states_{way}"][row]
            np.testing.assert_allclose(processor.state(seen), expected, rtol=0, atol=1e-5)
            actions = processor.chunk(normalized, state=seen.state).actions
            expected = golden[f"{kind}_actions_{way}"][row]
            np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-6)


def test_limits_are_the_robot_s(
    processors: dict[tuple[str, str], Processor], folders: dict[str, Path]
) -> None:
    """Where the policy counts the other way they are exchanged, and a unit stays a length."""
    turned = processors["quantiles", "absolute"].statistics.action
    plain = load_policy(folders["quantiles"]).processor.statistics.action
    assert (turned.low < turned.high).all() and (turned.scale() > 0).all()
    np.testing.assert_allclose([turned.low[1], turned.high[1]], [-plain.high[1], -plain.low[1]])
    ends = np.stack([-np.ones(14), np.ones(14)]).astype(np.float32)
    limits = turned.normalize(np.stack([turned.low, turned.high]))
    np.testing.assert_allclose(turned.places(limits), ends, rtol=0, atol=1e-5)
    back = turned.unnormalize(turned.normalize(ends))
    np.testing.assert_allclose(back, ends, rtol=0, atol=1e-5)


def test_both_ends_of_the_robot_add_the_state(folders: dict[str, Path], tmp_path: Path) -> None:
    """The network's policy and a bundle's give the same robot's actions."""
    policy = load_policy(stated(folders["mean_std"], tmp_path / "c", relative_actions=[0, 5]))
    (seen,) = pi_observations(1, cameras=SLOTS[:1])
    seen = replace(seen, state=np.linspace(-1, 1, 14, dtype=np.float32))
    chunk = policy.infer(seen)
    told = policy.processor.statistics.action.unnormalize(chunk.normalized)
    told[:, [0, 5]] += seen.state[[0, 5]]
    np.testing.assert_allclose(chunk.actions, told, rtol=1e-6)
    engine = SimpleNamespace(infer=lambda _: {"actions": chunk.normalized[None]}, part_ms={})
    bundle = SimpleNamespace(processor=policy.processor)
    robot = EnginePolicy(cast(Bundle, bundle), cast(Engine, engine))
    np.testing.assert_array_equal(robot.infer(seen).actions, chunk.actions)
    np.testing.assert_array_equal(guarded(robot).infer(seen).actions, chunk.actions)
    with pytest.raises(InvalidObservation, match="at least 6 numbers, got 0"):
        policy.processor.chunk(chunk.normalized)


def test_commands_are_not_held_within_differences(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = load_policy(stated(folders["mean_std"], tmp_path / "c", relative_actions=[0, 5]))
    options = RunOptions("checkpoint", "stdin", 20, instruction="go", hold="last")
    with pytest.raises(QvlaError, match=r"differences to the state.*--limits"):
        run_policy(options, policy)


def test_an_aloha_is_told_what_is_assumed(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["mean_std"], tmp_path / "c")
    (folder / "qvla_policy.json").unlink()
    assert describe_checkpoint(folder).endswith(", adapt_to_pi False, relative_actions none")


@pytest.mark.parametrize("number", [6, 13])
def test_grippers_are_never_relative(number: int, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = stated(
        folders["mean_std"], tmp_path / "c", adapt_to_pi=True, relative_actions=[0, number]
    )
    with pytest.raises(ArtifactError, match=rf"\[{number}\], an ALOHA's grippers"):
        load_policy(folder)


def test_a_manifest_that_says_nothing_of_joints_is_as_before(folders: dict[str, Path]) -> None:
    assert "joints" not in processor_to_json(load_policy(folders["mean_std"]).processor)["spec"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["spec"]["joints"].update(aloha="yes"), "true or false"),
        (lambda m: m["spec"]["joints"].update(aloha=False), "finite, positive"),
        (lambda m: m["spec"]["joints"].update(relative=[14]), "from 0 to 13"),
        (lambda m: m["spec"]["joints"].update(relative=[0, 6]), "grippers"),
        (lambda m: m["spec"]["joints"].update(relative=3), "relative_actions"),
        (lambda m: m["spec"]["joints"].update(speed=1), "not readable"),
        (lambda m: m["spec"].update(joints=[1]), "not readable"),
        (lambda m: m["spec"].update(joints=None), "not readable"),
        (lambda m: m["statistics"]["action"]["divisor"].__setitem__(1, 1.0), "finite, positive"),
    ],
)
def test_joints_that_no_checkpoint_could_say_are_refused(
    change: Callable[[dict[str, Any]], object],
    message: str,
    processors: dict[tuple[str, str], Processor],
) -> None:
    processor = processors["mean_std", "relative"]
    stored = json.loads(json.dumps(processor_to_json(processor)))
    change(stored)
    with pytest.raises(ArtifactError, match=message):
        processor_from_json(stored, processor.tokenizer)

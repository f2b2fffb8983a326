"""What a bundle says and names is checked as a checkpoint is: limits, names, files, weights."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import change_manifest, make_bundle, mixed_plan

from jetson.errors import PolicyFailure
from jetson.guarded_policy import MOST_NORMALIZED, guarded
from jetson.policy import EnginePolicy, UnsafeAction
from jetson.serving.service import ActionService
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.artifacts import sha256_file
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.external_data import external_tensors
from qvla_export.shared.observation import Observation

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def original(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    path = tmp_path_factory.mktemp("bundles") / "mixed"
    return make_bundle(tiny_policy, mixed_plan(tiny_policy), tiny_observations(2), path)


@pytest.fixture
def copied(original: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.path, tmp_path / "bundle"))


def change_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    entry = {"sha256": sha256_file(folder / name), "bytes": len(content)}
    change_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


def limits(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["processor"]["statistics"]["action"]
    return found


def exchange(manifest: dict[str, Any]) -> None:
    action = limits(manifest)
    action["low"], action["high"] = action["high"], action["low"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchange, "finite, ordered"),
        (lambda m: limits(m)["high"].__setitem__(0, 1e30), "within 1,000,000"),
        (lambda m: limits(m)["low"].__setitem__(0, float("-inf")), "Infinity is no JSON"),
        (lambda m: limits(m)["high"].__setitem__(0, None), "finite, ordered"),
        (lambda m: limits(m)["high"].append(1.0), "must have"),
        (lambda m: m["processor"]["spec"].update(horizon=0), "horizon"),
        (lambda m: m["processor"]["spec"].update(horizon=2.5), "horizon"),
        (lambda m: m["processor"]["spec"].update(action_dim=-7), "action_dim"),
        (lambda m: m["processor"]["spec"].update(state_dim=10**9), "state_dim"),
        (lambda m: m["processor"]["spec"].update(cameras=["a", "a"]), "different names"),
        (lambda m: m["processor"]["spec"].update(cameras=[]), "different names"),
        (lambda m: m["processor"]["spec"].update(cameras=[1]), "different names"),
        (lambda m: m["processor"]["spec"].update(prompt="do it"), "prompt"),
        (lambda m: m["processor"]["spec"].update(prompt="{instruction} {0.__class__}"), "braces"),
        (lambda m: m["files"].popitem(), "manifest"),
    ],
)
def test_what_no_checkpoint_could_say_is_refused(
    copied: Path, change: Change, message: str
) -> None:
    change_manifest(copied, change)
    with pytest.raises(QvlaError, match=message):
        Bundle.load(copied)


@pytest.mark.parametrize("name", ["weights.bin", "policy.onnx.data2", ".hidden", "folder"])
def test_a_file_that_the_manifest_does_not_list_is_refused(copied: Path, name: str) -> None:
    (copied / name).mkdir() if name == "folder" else (copied / name).write_bytes(b"x")
    with pytest.raises(ArtifactError, match="does not list"):
        Bundle.load(copied)


def graph_reading(folder: Path, location: str, offset: str = "0") -> bytes:
    """The bundle's graph with one weight, deep inside a branch, from somewhere else."""
    model = onnx.load(str(folder / "policy.onnx"), load_external_data=False)
    weight = next(t for t in model.graph.initializer if t.external_data)
    moved = copy.deepcopy(weight)
    moved.name = "elsewhere"
    for entry in moved.external_data:
        if entry.key == "location":
            entry.value = location
        if entry.key == "offset":
            entry.value = offset
    constant = onnx.NodeProto(op_type="Constant", output=["elsewhere"])
    constant.attribute.append(onnx.helper.make_attribute("value", moved))
    branch = onnx.helper.make_graph([constant], "branch", [], [])
    node = onnx.NodeProto(op_type="If", input=["condition"], output=["x"])
    node.attribute.append(onnx.helper.make_attribute("then_branch", branch))
    model.graph.node.append(node)
    return model.SerializeToString()


@pytest.mark.parametrize(
    "location", ["../policy.onnx.data", "/etc/hostname", "manifest.json", "other", ""]
)
def test_weights_outside_the_listed_files_are_refused(copied: Path, location: str) -> None:
    change_file(copied, "policy.onnx", graph_reading(copied, location))
    with pytest.raises(ArtifactError, match="does not list; do not use"):
        Bundle.load(copied)


def test_weights_behind_the_end_of_a_file_are_refused(copied: Path) -> None:
    change_file(copied, "policy.onnx", graph_reading(copied, "policy.onnx.data", "999999999"))
    with pytest.raises(ArtifactError, match="behind the end"):
        Bundle.load(copied)


def test_the_walk_finds_what_onnx_finds(original: Bundle) -> None:
    model = onnx.load(str(original.path / "policy.onnx"), load_external_data=False)
    expected = {
        (t.name, *(entry.value for entry in t.external_data if entry.key != "checksum"))
        for t in model.graph.initializer
        if t.external_data
    }
    found = external_tensors(original.path / "policy.onnx")
    assert {(t.name, t.location, str(t.offset), str(t.length)) for t in found} == expected
    assert expected


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_graphs_are_read_or_refused(original: Bundle, data: st.DataObject) -> None:
    content = bytearray((original.path / "policy.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(content) - 1))
        content[index] = data.draw(st.integers(0, 255))
    path = original.path.parent / "damaged.onnx"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        external_tensors(path)
    except ArtifactError as error:
        assert "no ONNX model" in str(error)


class Scaled:
    """An engine that puts out a multiple of what the demonstrations had at most."""

    part_ms: dict[str, float] = {}  # noqa: RUF012 - nothing is ever put in

    def __init__(self, bundle: Bundle, factor: float) -> None:
        spec = bundle.processor.spec
        self.actions = np.full((1, spec.horizon, spec.action_dim), factor, np.float32)

    def infer(self, feeds: object) -> dict[str, np.ndarray]:
        return {"actions": self.actions}

    def close(self) -> None:
        pass


def test_actions_far_outside_the_limits_are_not_served(
    original: Bundle, tiny_observations: Callable[..., list[Observation]]
) -> None:
    observation = tiny_observations(1)[0]
    near = EnginePolicy(original, Scaled(original, MOST_NORMALIZED))  # type: ignore[arg-type]
    assert np.isfinite(guarded(near).infer(observation).actions).all()
    far = EnginePolicy(original, Scaled(original, -MOST_NORMALIZED - 0.01))  # type: ignore[arg-type]
    with pytest.raises(UnsafeAction, match=r"-3\.01 at \[step, dimension\] \[0, 0\]"):
        guarded(far).infer(observation)
    with pytest.raises(PolicyFailure, match=r"UnsafeAction.*-3\.01"):
        ActionService(far).act(observation)
    # A simulator counts what an absurd action does; it does not end the evaluation.
    assert np.isfinite(far.infer(observation).actions).all()

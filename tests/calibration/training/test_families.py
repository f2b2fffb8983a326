"""A small policy of every family: it learns, opens as its family's, and goes on after a kill."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_datasets import INSTRUCTIONS, write_small_dataset
from small_training import CONFIG, SIZE

from calibration.benchmarks.metaworld.object_state import IMAGE_SIZE, OBJECT_STATE
from calibration.sources.lerobot import LeRobotDataset
from calibration.training.demonstrated_frames import DemonstratedFrames, load_demonstrations
from calibration.training.family_trainer import FamilyTrainer
from calibration.training.learner import Learner
from calibration.training.learners.chunks import ActLearner
from calibration.training.learners.flows import PiLearner, SmolVlaLearner
from calibration.training.learners.tokens import OpenVlaLearner, UniVlaLearner
from calibration.training.recipes import FAMILY_RECIPES, RECIPES, named_recipe
from calibration.training.train import train_family, train_recipe
from qvla_export.policies.act.new_checkpoint import ActSize
from qvla_export.policies.families import FAMILIES, load_policy, recognize
from qvla_export.policies.flow.new_checkpoint import FlowSize
from qvla_export.policies.smolvla.new_checkpoint import SmolVlaSize
from qvla_export.shared.artifacts import sha256_tree
from qvla_export.shared.errors import ArtifactMismatch, QvlaError
from qvla_export.shared.observation import Observation

LENGTHS = (9, 12, 7)
CALM = replace(CONFIG, learning_rate=3e-3, state_dropout=0.0)
_FLOW = FlowSize(
    image_size=28,
    vision_dim=16,
    vision_mlp=32,
    vision_depth=1,
    language_dim=32,
    language_mlp=32,
    expert_dim=32,
    expert_mlp=32,
    depth=2,
    head_dim=8,
    action_width=6,
)
LEARNERS: Mapping[str, Learner] = {
    "openvla": OpenVlaLearner("image", replace(SIZE, vocab_size=560), "small"),
    "univla": UniVlaLearner("image", SIZE, "small"),
    "pi0": PiLearner("image", False, replace(_FLOW, vocab_size=320), "small"),
    "pi0.5": PiLearner("image", True, replace(_FLOW, vocab_size=600), "small"),
    "smolvla": SmolVlaLearner("image", SmolVlaSize(**vars(_FLOW))),
    "act": ActLearner("image", ActSize((4, 4, 8, 8), 32, 32)),
}
# Of a recipe's name -> the family that opens it.
HOMES = {"pi0": "pi", "pi0.5": "pi"}


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_dataset(tmp_path_factory.mktemp("families") / "demos", LENGTHS)


@pytest.fixture(scope="module")
def demonstrations(demos: Path) -> DemonstratedFrames:
    return load_demonstrations(LeRobotDataset(demos), "image")


def test_every_family_has_a_recipe() -> None:
    assert {HOMES.get(name, name) for name in FAMILY_RECIPES} | {"oft"} == {
        family.name for family in FAMILIES
    }
    assert set(FAMILY_RECIPES) == set(LEARNERS)
    assert named_recipe("oft") is RECIPES["pictures"]
    assert named_recipe("oft", "object-state") is RECIPES["object-state"]
    with pytest.raises(QvlaError, match=r"no family is called 'pi'; choose from oft, openvla, "):
        named_recipe("pi")
    with pytest.raises(QvlaError, match=r"pi0 has one; leave --recipe pictures out"):
        named_recipe("pi0", "pictures")


@pytest.mark.parametrize("name", LEARNERS)
def test_a_family_learns(name: str, demonstrations: DemonstratedFrames, tmp_path: Path) -> None:
    """Losses of the same draws fall; what is saved is opened as the family's, and acts so."""
    trainer = FamilyTrainer(demonstrations, LEARNERS[name], replace(CALM, steps=1000))
    rows = torch.arange(len(demonstrations))

    def total() -> float:
        with torch.no_grad():
            drawn = trainer.losses(rows, torch.Generator().manual_seed(3))
        return float(sum(drawn.values()))

    before = total()
    for _ in range(25):
        trainer.train_step()
    assert total() < 0.9 * before
    trainer.save(tmp_path / "checkpoint")
    assert recognize(tmp_path / "checkpoint").name == HOMES.get(name, name)
    policy = load_policy(tmp_path / "checkpoint")
    observation = demonstrations.observation(5)
    network = trainer.policy.module.eval()
    network.load_state_dict(trainer.averaged.state_dict())
    inputs = trainer.policy.inputs([observation])
    expected = trainer.policy.greedy_actions(inputs)[0].numpy()
    chunk = policy.infer(observation)
    assert chunk.actions.shape == (LEARNERS[name].horizon, 4)
    # Weights are stored in bfloat16; a token that just wins may be another then.
    off = np.abs(chunk.normalized - expected)
    assert np.median(off) < (0.3 if name in ("openvla", "univla") else 0.05)


def test_actions_are_normalized_as_the_policy_does(demonstrations: DemonstratedFrames) -> None:
    for learner in LEARNERS.values():
        trainer = FamilyTrainer(demonstrations, learner, CALM)
        physical = trainer.policy.processor.chunk(trainer._chunks[9].numpy()).actions
        low, high = (np.asarray(demonstrations.statistics["action"][q]) for q in ("q01", "q99"))
        clips = learner.description()["family"] in ("openvla", "univla")
        # The tenth frame begins the second episode.
        done = demonstrations.actions[1][: learner.horizon]
        expected = np.clip(done, low, high) if clips else done
        np.testing.assert_allclose(physical, expected, atol=1e-4)


def test_a_family_goes_on_bit_for_bit(demos: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # Without a decay, so that how many steps are planned says nothing of the first ones.
    six = replace(CALM, steps=6, decay_fraction=0.01)
    train_family(demos, whole, LEARNERS["pi0"], six)
    train_family(demos, cut, LEARNERS["pi0"], replace(six, steps=3))
    first = sha256_tree(cut / "checkpoint")
    train_family(demos, cut, LEARNERS["pi0"], six)
    assert sha256_tree(cut / "checkpoint") == sha256_tree(whole / "checkpoint") != first
    about = json.loads((whole / "training.json").read_text())
    assert (about["frames"], about["episodes"]) == (sum(LENGTHS), len(LENGTHS))
    assert about["learner"]["family"] == "pi"
    with pytest.raises(ArtifactMismatch, match="learner="):
        train_family(demos, whole, LEARNERS["smolvla"], six)


def test_demonstrations_that_do_not_fit_are_refused(demos: Path, tmp_path: Path) -> None:
    pi0 = LEARNERS["pi0"]
    with pytest.raises(QvlaError, match="takes 64 frames, the data set has 28"):
        train_family(demos, tmp_path / "run", pi0, replace(CALM, batch_size=64))
    with pytest.raises(QvlaError, match="sees camera 'object_state'"):
        train_family(demos, tmp_path / "run", FAMILY_RECIPES["pi0"].learner, CALM)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name in FAMILY_RECIPES if name != "act"])
def test_recipes_of_things_take_object_state(name: str, tmp_path: Path) -> None:
    """What the repository's own policies are begun with opens and acts."""
    learner, random = FAMILY_RECIPES[name].learner, np.random.default_rng(0)
    shape = (12, IMAGE_SIZE, IMAGE_SIZE, 3)
    limits = {"mean": [0.0] * 4, "std": [1.0] * 4, "min": [-1.0] * 4, "max": [1.0] * 4}
    limits |= {"q01": [-1.0] * 4, "q99": [1.0] * 4, "mask": [True] * 4}
    seen = DemonstratedFrames(
        OBJECT_STATE,
        random.integers(0, 256, shape, dtype=np.uint8),
        np.zeros((12, 4), np.float32),
        (np.zeros((12, 4), np.float32),),
        INSTRUCTIONS * 4,
        {"action": limits, "proprio": limits},
    )
    learner.write(tmp_path / "new", learner.new_module(seen, 0), seen)
    images = {OBJECT_STATE: seen.images[0]}
    chunk = load_policy(tmp_path / "new").infer(
        Observation(images, INSTRUCTIONS[0], np.zeros(4, np.float32))
    )
    assert chunk.actions.shape == (learner.horizon, 4)
    # Together at most 8 MB: five of these, and ACT's.
    assert sum(p.stat().st_size for p in (tmp_path / "new").rglob("*") if p.is_file()) < 1.8e6


def test_a_family_that_is_not_compiled_says_so(tmp_path: Path) -> None:
    recipe = FAMILY_RECIPES["act"]
    with pytest.raises(QvlaError, match="only trainings of oft are compiled"):
        train_recipe(tmp_path, tmp_path / "out", recipe, replace(recipe.training, compiled=True))

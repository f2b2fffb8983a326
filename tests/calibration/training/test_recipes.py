"""The object-state recipe: from experts to a policy that the tool opens like any other."""

from dataclasses import replace
from pathlib import Path

import pytest

from calibration.benchmarks.metaworld.demonstrations import Recording, record_demonstrations
from calibration.benchmarks.metaworld.object_state import IMAGE_SIZE, OBJECT_STATE
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import find_task
from calibration.training.recipes import RECIPES, find_recipe
from calibration.training.train import train_policy
from qvla_export.policies.oft.policy import load_oft_policy
from qvla_export.shared.errors import InvalidObservation, QvlaError


def test_recipes_are_found_by_name() -> None:
    assert find_recipe("pictures") is RECIPES["pictures"]
    with pytest.raises(QvlaError, match="no recipe is called 'words'; choose from pictures, obj"):
        find_recipe("words")


def test_experts_become_an_object_state_policy(tmp_path: Path) -> None:
    tasks = [find_task("push"), find_task("hand-insert")]
    record_demonstrations(tmp_path / "demos", tasks, 1, Recording(seed=2), workers=1)
    recipe = find_recipe("object-state")
    few = replace(recipe.training, steps=3, batch_size=16)
    arguments = tmp_path / "demos", tmp_path / "training", recipe.size, few, recipe.data_name
    checkpoint = train_policy(*arguments, policy=recipe.policy)
    policy = load_oft_policy(checkpoint)
    assert policy.processor.spec.cameras == (OBJECT_STATE,)
    assert policy.processor.spec.image.size == IMAGE_SIZE
    with Simulator(tasks[0]) as simulator:
        chunk = policy.infer(simulator.reset(0))
    assert chunk.actions.shape == (8, 4)
    # No tower runs a block: what object state passes through is its embedding.
    assert not [name for name in policy.layers() if "encoder" in name]
    # Neither is taken for the other.
    with pytest.raises(QvlaError, match="the policy sees camera 'image'"):
        pictures = find_recipe("pictures")
        other = tmp_path / "other"
        train_policy(arguments[0], other, pictures.size, pictures.training, "pictures")
    with Simulator(find_task("drawer-open"), 8) as simulator:
        drawn = simulator.reset(0)
    with pytest.raises(InvalidObservation, match="object_state"):
        policy.infer(drawn)

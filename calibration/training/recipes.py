"""Recipes of the repository's own policies: what each sees, its size, how it is trained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from calibration.benchmarks.metaworld import object_state
from calibration.training.trainer import REFERENCE_CONFIG, TrainingConfig
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.prismatic.new_checkpoint import NetworkSize
from qvla_export.shared.errors import QvlaError


@dataclass(frozen=True)
class Recipe:
    """What decides a policy apart from its demonstrations."""

    policy: OftConfig
    size: NetworkSize
    training: TrainingConfig
    # Key of the demonstrations' statistics in the checkpoint.
    data_name: str


_PICTURES = Recipe(
    REFERENCE_CONFIG, NetworkSize(), TrainingConfig(steps=6000), "metaworld_scripted"
)
# No picture: patches are object state, which one linear map embeds. A tower of depth 1 runs no
# block, since the last one of a tower is never used.
_OBJECT_STATE = Recipe(
    replace(REFERENCE_CONFIG, cameras=(object_state.OBJECT_STATE,)),
    NetworkSize(
        image_size=object_state.IMAGE_SIZE,
        patch_size=object_state.PATCH_SIZE,
        vision_dim=32,
        vision_depth=1,
        hidden_dim=64,
        mlp_dim=128,
        depth=4,
        heads=2,
    ),
    TrainingConfig(
        steps=1400,
        learning_rate=1.5e-3,
        warmup_steps=100,
        state_dropout=0.0,
        goal_weight=0.1,
        color_jitter=0.0,
        precision="fp32",
    ),
    "metaworld_precise",
)
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {"pictures": _PICTURES, "object-state": _OBJECT_STATE}
)


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        QvlaError: there is none; the message lists the names.
    """
    if name not in RECIPES:
        raise QvlaError(f"no recipe is called {name!r}; choose from {', '.join(RECIPES)}")
    return RECIPES[name]

"""Recipes of the repository's own policies: what each sees, its size, how it is trained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from calibration.benchmarks.metaworld import object_state
from calibration.benchmarks.metaworld.tasks import CAMERA, HAND_CAMERA
from calibration.training.base_trainer import TrainingConfig
from calibration.training.learner import Learner
from calibration.training.learners.chunks import ActLearner
from calibration.training.learners.flows import PiLearner, SmolVlaLearner
from calibration.training.learners.tokens import OpenVlaLearner, UniVlaLearner
from calibration.training.trainer import REFERENCE_CONFIG
from qvla_export.policies.act.new_checkpoint import ActSize
from qvla_export.policies.flow.new_checkpoint import FlowSize
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.prismatic.new_checkpoint import NetworkSize
from qvla_export.policies.prismatic.pretrained import DINOV2_SMALL, TowerChoice
from qvla_export.policies.smolvla.new_checkpoint import SmolVlaSize
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
# Two cameras through the first half of a pretrained DINOv2-small, which stays as it is; of the
# other tower only the embedding of patches, which shows the pixels as they are. Training also says
# where things are, in the numbers that the object-state policy is given.
_PRETRAINED = Recipe(
    replace(
        REFERENCE_CONFIG,
        cameras=(CAMERA, HAND_CAMERA),
        vision_heads=(DINOV2_SMALL.heads, 2),
    ),
    NetworkSize(
        patch_size=DINOV2_SMALL.patch,
        vision_dim=32,
        vision_depth=1,
        hidden_dim=128,
        mlp_dim=256,
        depth=6,
        heads=2,
        pretrained=TowerChoice(DINOV2_SMALL, DINOV2_SMALL.blocks // 2 + 1),
    ),
    TrainingConfig(
        steps=6000,
        learning_rate=1e-3,
        warmup_steps=100,
        state_dropout=0.0,
        goal_weight=0.5,
        color_jitter=0.0,
        precision="fp32",
        save_every_steps=100,
        frame_stride=2,
        goal_camera=object_state.OBJECT_STATE,
    ),
    "metaworld_precise_pictures",
)
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {"pictures": _PICTURES, "object-state": _OBJECT_STATE, "pretrained": _PRETRAINED}
)


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        QvlaError: there is none; the message lists the names.
    """
    if name not in RECIPES:
        raise QvlaError(f"no recipe is called {name!r}; choose from {', '.join(RECIPES)}")
    return RECIPES[name]


@dataclass(frozen=True)
class FamilyRecipe:
    """What decides a small policy of a family apart from its demonstrations."""

    learner: Learner
    training: TrainingConfig


_TRAINING = TrainingConfig(
    steps=1500,
    learning_rate=1.5e-3,
    warmup_steps=100,
    state_dropout=0.0,
    precision="fp32",
)
_TOKEN_SIZE = NetworkSize(
    image_size=object_state.IMAGE_SIZE,
    patch_size=object_state.PATCH_SIZE,
    vision_dim=64,
    vision_depth=2,
    hidden_dim=64,
    mlp_dim=128,
    depth=4,
    heads=2,
    vocab_size=704,
)
_FLOW_SIZE = FlowSize(
    image_size=object_state.IMAGE_SIZE,
    patch_size=object_state.PATCH_SIZE,
    vision_depth=1,
    action_width=8,
)
_STATE, _DATA = object_state.OBJECT_STATE, "metaworld_things"
# A family as people write it -> its small policy. All but ACT's see object state in place of
# pictures; ACT reads no instruction.
FAMILY_RECIPES: Mapping[str, FamilyRecipe] = MappingProxyType(
    {
        "openvla": FamilyRecipe(OpenVlaLearner(_STATE, _TOKEN_SIZE, _DATA), _TRAINING),
        "univla": FamilyRecipe(
            UniVlaLearner(_STATE, replace(_TOKEN_SIZE, vocab_size=448), _DATA), _TRAINING
        ),
        "pi0": FamilyRecipe(PiLearner(_STATE, False, _FLOW_SIZE, _DATA), _TRAINING),
        "pi0.5": FamilyRecipe(PiLearner(_STATE, True, _FLOW_SIZE, _DATA), _TRAINING),
        "smolvla": FamilyRecipe(SmolVlaLearner(_STATE, SmolVlaSize(**vars(_FLOW_SIZE))), _TRAINING),
        "act": FamilyRecipe(
            ActLearner("image", ActSize()),
            replace(_TRAINING, learning_rate=1e-3, state_dropout=0.2),
        ),
    }
)
# The family of `RECIPES`.
OFT = "oft"
_USUAL = "pictures"


def named_recipe(family: str, name: str | None = None) -> Recipe | FamilyRecipe:
    """Return the recipe of a family's policy.

    Args:
        family: as people write it: "oft" or one of `FAMILY_RECIPES`.
        name: which of `RECIPES`; None for the usual one. Other families have one each.

    Raises:
        QvlaError: there is no such family or recipe; the message lists those there are.
    """
    if family == OFT:
        return find_recipe(name or _USUAL)
    if family not in FAMILY_RECIPES:
        known = ", ".join((OFT, *FAMILY_RECIPES))
        raise QvlaError(f"no family is called {family!r}; choose from {known}")
    if name is not None:
        raise QvlaError(f"recipes are of {OFT}, {family} has one; leave --recipe {name} out")
    return FAMILY_RECIPES[family]

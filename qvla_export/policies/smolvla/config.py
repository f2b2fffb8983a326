"""What config.json of a SmolVLA checkpoint and the VLM's beside it say; the rest is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvla_export.policies.flow.spec import FlowSpec
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.json_documents import FOREIGN, Node, read_json
from qvla_export.shared.lerobot.lerobot_config import (
    LeRobotConfig,
    require_built,
    require_policy_type,
)

VLM_FOLDER, TOKENIZER = "vlm", "tokenizer.json"
# Steps of the preprocessor beside those of every policy.
STEPS = ("smolvla_new_line_processor", "tokenizer_processor")
_MOST = 4096
# Field -> the only value that is computed here, and what it means.
_BUILT: Mapping[str, tuple[Any, str]] = {
    "n_obs_steps": (1, "observations that the policy sees"),
    "adapt_to_pi_aloha": (False, "another robot's joints"),
    "use_delta_joint_actions_aloha": (False, "actions relative to the state"),
    "add_image_special_tokens": (False, "tokens around pictures"),
    "attention_mode": ("cross_attn", "how the expert sees the VLM"),
}
# Field of the VLM's config.json -> the only value that is built here; where the field is left out,
# transformers' default for such a model is the same.
_VLM_KINDS: Mapping[str, str] = {
    "model_type": "smolvlm",
    "text_config.model_type": "llama",
    "text_config.hidden_act": "silu",
    "vision_config.hidden_act": "gelu_pytorch_tanh",
}


@dataclass(frozen=True)
class SmolVlaConfig:
    """What the policy sees and returns, and what weights do not show of its network."""

    horizon: int
    # Numbers that states and actions are filled up to with zeros.
    state_width: int
    action_width: int
    # Width and height that pictures are brought to.
    picture: tuple[int, int]
    flow: FlowSpec
    # Blocks of the VLM, and of the expert.
    depth: int
    # The expert's block i attends to itself where i is a multiple of it, else to the VLM alone.
    self_attention_every: int


@dataclass(frozen=True)
class VlmConfig:
    """What the VLM's config.json says, of which weights show nothing."""

    vision_heads: int
    vision_eps: float
    # Side of the blocks of patches that become one token.
    scale_factor: int
    heads: int
    kv_heads: int
    head_dim: int
    text_eps: float


def read_smolvla_config(config: LeRobotConfig) -> SmolVlaConfig:
    """Return what a SmolVLA checkpoint's config.json says.

    Raises:
        CheckpointError: the policy does something that is not built here.
        ArtifactError: a field is missing or malformed.
    """
    require_policy_type(config, "smolvla")
    node = config.node
    require_built(node, _BUILT)
    if not config.cameras or not config.state_dim:
        raise CheckpointError(f"{node.file}: a SmolVLA policy needs pictures and a state")
    depth = node.field("num_vlm_layers").whole(1, _MOST)
    if (own := node.field("num_expert_layers").value) not in (0, -1, depth):
        raise CheckpointError(
            f"{node.file}: num_expert_layers is {own!r}; an expert of fewer blocks than the VLM's "
            f"{depth} is not built here"
        )
    sides = [side.whole(1, _MOST) for side in node.field("resize_imgs_with_padding").elements()]
    if len(sides) != 2:
        raise node.field("resize_imgs_with_padding").wrong("[width, height] is needed")
    periods = [node.field(f"{name}_period").number() for name in ("min", "max")]
    return SmolVlaConfig(
        horizon=node.field("chunk_size").whole(1, _MOST),
        state_width=node.field("max_state_dim").whole(config.state_dim, _MOST),
        action_width=node.field("max_action_dim").whole(config.action_dim, _MOST),
        picture=(sides[0], sides[1]),
        flow=FlowSpec(node.field("num_steps").whole(1, 200), "computed", periods[0], periods[1]),
        depth=depth,
        self_attention_every=node.field("self_attn_every_n_layers").whole(1, _MOST),
    )


def vlm_folder(checkpoint: Path, config: LeRobotConfig) -> Path:
    """Return the folder with the VLM's config.json and tokenizer.json.

    LeRobot stores neither with the policy but names the VLM, which it loads from the Hub.

    Raises:
        CheckpointError: there is none in the checkpoint or beside it; says how to get it.
    """
    for folder in (checkpoint / VLM_FOLDER, checkpoint.parent / VLM_FOLDER):
        if (folder / "config.json").is_file() and (folder / TOKENIZER).is_file():
            return folder
    name = config.node.field("vlm_model_name").text()
    raise CheckpointError(
        f"{checkpoint} names the VLM {name}, whose heads and tokenizer are not stored with the "
        f"policy: hf download {name} config.json {TOKENIZER} --local-dir {checkpoint / VLM_FOLDER}"
    )


def read_vlm_config(folder: Path) -> VlmConfig:
    """Return what a VLM's config.json says.

    Raises:
        CheckpointError: it is of another kind than the one that is built here.
        ArtifactError: a field is missing or malformed.
    """
    node = _vlm_node(folder)
    for path, value in _VLM_KINDS.items():
        part, name = _holder(node, path)
        if part.has(name) and part.field(name).value != value:
            raise CheckpointError(
                f"{part.place}: {name} is {part.field(name).value!r}, which is not built here; "
                f"{value!r} is"
            )
    text, vision = node.field("text_config"), node.field("vision_config")
    heads = text.field("num_attention_heads").whole(1, _MOST)
    width = text.field("hidden_size").whole(1, 1 << 16)
    return VlmConfig(
        vision_heads=vision.field("num_attention_heads").whole(1, _MOST),
        vision_eps=_positive(vision, "layer_norm_eps", 1e-6),
        scale_factor=node.field("scale_factor").whole(1, 64),
        heads=heads,
        kv_heads=text.field("num_key_value_heads").whole(1, _MOST),
        head_dim=text.field("head_dim").whole(1, _MOST) if text.has("head_dim") else width // heads,
        text_eps=_positive(text, "rms_norm_eps", 1e-5),
    )


def vlm_assumptions(folder: Path) -> dict[str, object]:
    """Return the fields that a VLM's config.json leaves out, with the values that hold for them.

    Raises:
        CheckpointError, ArtifactError: as `read_vlm_config`.
    """
    config, node = read_vlm_config(folder), _vlm_node(folder)
    usual: Mapping[str, object] = {
        **_VLM_KINDS,
        "text_config.head_dim": config.head_dim,
        "text_config.rms_norm_eps": config.text_eps,
        "vision_config.layer_norm_eps": config.vision_eps,
    }
    holders = {path: _holder(node, path) for path in usual}
    missing = [path for path, (part, name) in holders.items() if not part.has(name)]
    return {f"{VLM_FOLDER} {path}": usual[path] for path in missing}


def _vlm_node(folder: Path) -> Node:
    path = folder / "config.json"
    return Node(read_json(path, "configuration of the VLM", FOREIGN), str(path))


def _holder(node: Node, path: str) -> tuple[Node, str]:
    """Return the object that holds a field of a dotted path, and the field's name."""
    part, _, name = path.rpartition(".")
    return (node.field(part) if part else node), name


def _positive(node: Node, name: str, usual: float) -> float:
    return node.field(name).positive() if node.has(name) else usual

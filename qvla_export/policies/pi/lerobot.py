"""What a pi0 or pi0.5 checkpoint of LeRobot's layout says of its policy.

Source: lerobot 0.6.1 `policies/pi0` and `policies/pi05`. From 0.5.0 on pi0.5's prompt has the
state's own numbers; 0.4.x filled them up to `max_state_dim` first, and no file tells which one
trained a checkpoint: `prompt_state_width` of `qvla_policy.json` says the latter.
"""

from pathlib import Path
from typing import Any

from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.json_documents import Node
from qvla_export.shared.lerobot.lerobot_config import (
    CONFIG,
    LeRobotConfig,
    is_lerobot,
    read_lerobot_config,
)
from qvla_export.shared.lerobot.lerobot_statistics import (
    POSTPROCESSOR,
    PREPROCESSOR,
    lerobot_statistics,
    read_normalizers,
    read_steps,
)
from qvla_export.shared.normalization import Statistics
from qvla_export.shared.policy_interface import lerobot_interface

# Kind of policy -> whether its norms are adaptive.
_KINDS = {"pi0": False, "pi05": True}
_TOKENIZER, _STATE_PROMPT = "tokenizer_processor", "pi05_prepare_state_tokenizer_processor_step"
# Steps of the processor files that are computed here, beside those that every policy has.
STEPS = (
    _TOKENIZER,
    _STATE_PROMPT,
    "pi0_new_line_processor",
    "relative_actions_processor",
    "absolute_actions_processor",
)
# Switches of config.json that change what is computed; absent in older versions.
_SWITCHES = ("use_relative_actions", "use_visual_memory", "use_proprioceptive_memory")
_MOST = 8192


def is_lerobot_pi(checkpoint: Path) -> bool:
    """Whether a folder is LeRobot's, of a pi0 or pi0.5.

    Raises:
        ArtifactError: its config.json is not JSON.
    """
    return is_lerobot(checkpoint) and read_lerobot_config(checkpoint).type in _KINDS


def lerobot_values(checkpoint: Path, preset: str | None) -> dict[str, Any]:
    """Return the fields of a `PiConfig` that config.json and the processor files say.

    Raises:
        CheckpointError: something that is not computed here, or a preset.
        ArtifactError, StatisticsError: files are missing or malformed.
    """
    config = read_lerobot_config(checkpoint, preset)
    node, adaptive = config.node, _KINDS[config.type]
    for name in _SWITCHES:
        if node.has(name) and node.field(name).value:
            raise CheckpointError(
                f"{checkpoint / CONFIG}: {name} is on, which is not computed here; the policy "
                "would act without it"
            )
    prompt_tokens = _prompt_tokens(checkpoint)
    resolution = node.field("image_resolution")
    sides = [side.whole(1, _MOST) for side in resolution.elements()]
    if len(sides) != 2 or sides[0] != sides[1]:
        raise resolution.wrong("[height, width] of a square image is needed")
    return {
        **vars(lerobot_interface(config)),
        "adaptive": adaptive,
        "flow_steps": node.field("num_inference_steps").whole(1, _MOST),
        "flow_times": "computed",
        "min_period": node.field("min_period").number(),
        "max_period": node.field("max_period").number(),
        "resize": "pad-center",
        "language": "cleaned" if adaptive else "line",
        "max_prompt_tokens": prompt_tokens,
        "image_side": sides[0],
    }


def read_statistics(checkpoint: Path, unnorm_key: str | None) -> Statistics:
    """Return what normalizes the state and un-normalizes the actions.

    Raises:
        StatisticsError, ArtifactError: they are missing or do not fit, or a data set is named.
    """
    config = read_lerobot_config(checkpoint)
    _require_raw_pictures(config)
    before, after = read_normalizers(checkpoint, config, STEPS)
    return lerobot_statistics(config, before, after, unnorm_key)


def _prompt_tokens(checkpoint: Path) -> int:
    """Return how many tokens a prompt may have; refuse steps that do what is not done here."""
    steps = [
        step
        for name in (PREPROCESSOR, POSTPROCESSOR)
        for step in read_steps(checkpoint, name, STEPS)
    ]
    for step in steps:
        if step.config.has("enabled") and step.config.field("enabled").value:
            raise step.config.field("enabled").wrong(
                "relative actions are not computed here, so it must be false"
            )
        if step.config.has("include_state_in_prompt"):
            _require(step.config.field("include_state_in_prompt"), True)
    tokenizers = [step.config for step in steps if step.name == _TOKENIZER]
    if len(tokenizers) != 1:
        raise CheckpointError(
            f"{checkpoint / PREPROCESSOR}.json needs one step {_TOKENIZER!r}, it has "
            f"{len(tokenizers)}; save the processors with the policy again"
        )
    _require(tokenizers[0].field("padding_side"), "right")
    return tokenizers[0].field("max_length").whole(1, _MOST)


def _require(node: Node, value: object) -> None:
    if node.value != value:
        raise node.wrong(f"{value!r} is computed here, nothing else")


def _require_raw_pictures(config: LeRobotConfig) -> None:
    if config.modes.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise CheckpointError(
            f"{config.node.file}: pictures are normalized ({config.modes['VISUAL']}), which pi0 "
            "and pi0.5 do not expect; VISUAL must be IDENTITY"
        )

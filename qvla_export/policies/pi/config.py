"""What a pi0 or pi0.5 checkpoint says of its policy in either layout, and what is taken else."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qvla_export.policies.flow.spec import FlowSpec, Times
from qvla_export.policies.pi.lerobot import is_lerobot_pi, lerobot_values
from qvla_export.policies.prismatic.files import stored_headers
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.frames import Resize
from qvla_export.shared.inputs.prompts import require_prompt
from qvla_export.shared.openpi.joint_frame import ALOHA_DIMENSIONS, JointFrame
from qvla_export.shared.openpi.openpi_files import is_openpi
from qvla_export.shared.pictures.picture_bounds import MOST_INPUT_SIDE
from qvla_export.shared.policy_interface import (
    CONFIG_NAME,
    MOST_SIZE,
    PolicyInterface,
    openpi_interface,
    read_policy_config,
)
from qvla_export.shared.processor import Language

# Tokens of a prompt in training: openpi `Pi0Config.max_token_len`.
PROMPT_TOKENS = {False: 48, True: 200}
PROMPT = {False: "{instruction}\n", True: "Task: {instruction}, State: {state};\nAction: "}

# Heads of PaliGemma's tower, So400m, and its width: where the width is another, heads must be said.
PUBLISHED_HEADS, PUBLISHED_WIDTH = 16, 1152
_MOST_HEADS, _MOST_SEED = 1024, (1 << 63) - 1
# Fields that decide actions, that differ between published checkpoints, and that files of a layout
# do not say. The others are the same in all of it: openpi's code has them, no configuration.
_UNSAID_BY_OPENPI = (
    "cameras",
    "vision_heads",
    "flow_steps",
    "prompt",
    "max_prompt_tokens",
    "adapt_to_pi",
    "relative_actions",
)
# What openpi's configurations convert between robot and policy, and LeRobot does otherwise.
_OF_OPENPI = ("adapt_to_pi", "relative_actions")
_UNSAID_BY_LEROBOT = ("vision_heads", "prompt_state_width")


@dataclass(frozen=True)
class PiConfig(PolicyInterface):
    """Inputs and flow of one pi0 or pi0.5 checkpoint.

    Raises:
        CheckpointError, ArtifactError: a value that no such policy has.
    """

    # Whether the norms are adaptive and the state is in the prompt: pi0.5.
    adaptive: bool = False
    # Attention heads of SigLIP: the one shape weights do not show. 0: those of its published size.
    vision_heads: int = 0
    flow_steps: int = 10
    flow_times: Times = "accumulated"
    min_period: float = 4e-3
    max_period: float = 4.0
    # How frames of another size are resized, and what becomes of an instruction.
    resize: Resize = "pad-center-antialias"
    language: Language = "cleaned"
    prompt: str = PROMPT[False]
    max_prompt_tokens: int = PROMPT_TOKENS[False]
    # What pi0.5's state is filled up to with zeros in the prompt; 0: it is as long as it is.
    prompt_state_width: int = 0
    # Pixels of a side of the network's images, where a file says so; 0: what the weights say.
    image_side: int = 0
    # Cameras that an observation may lack; the policy then acts without them.
    optional_cameras: tuple[str, ...] = ()
    # Of the noise that actions begin at.
    noise_seed: int = 0
    # Whether an ALOHA's joints and grippers are counted as openpi's base policies do.
    adapt_to_pi: bool = False
    # Numbers of an action that are differences to the same numbers of the state.
    relative_actions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("flow_times", ("accumulated", "computed"))
        self._require_choice("resize", ("pad-center", "pad-center-antialias"))
        self._require_choice("language", ("cleaned", "line"))
        self._require_names("optional_cameras", 0)
        strange = set(self.optional_cameras) - set(self.cameras)
        if strange or set(self.optional_cameras) == set(self.cameras):
            raise CheckpointError(
                "optional_cameras must be some of the cameras, one at least must always be there, "
                f"got {self.optional_cameras} of {self.cameras}"
            )
        if not self.state_dim:
            raise CheckpointError("pi0 and pi0.5 take a state; state_dim must be at least 1")
        self._require_whole("noise_seed", 0, _MOST_SEED)
        self._require_whole("vision_heads", 0, _MOST_HEADS)
        self._require_whole("max_prompt_tokens", 1, MOST_SIZE)
        self._require_whole("prompt_state_width", 0, MOST_SIZE)
        self._require_whole("image_side", 0, MOST_INPUT_SIDE)
        require_prompt(self.prompt, self.adaptive)
        self.joints.require_fits(self.action_dim, self.state_dim)
        _ = self.flow

    @property
    def joints(self) -> JointFrame:
        """Return how the robot's joints stand to the policy's."""
        return JointFrame(self.adapt_to_pi, self.relative_actions)

    @property
    def flow(self) -> FlowSpec:
        """Return how the flow is integrated."""
        return FlowSpec(self.flow_steps, self.flow_times, self.min_period, self.max_period)


def load_config(
    checkpoint: Path, preset: str | None = None, unnorm_key: str | None = None
) -> PiConfig:
    """Read what a checkpoint's files say of its policy; `qvla_policy.json` goes first.

    openpi's files leave much unsaid: its three cameras and ten steps, or a preset's cameras,
    dimensions and units. LeRobot's say all but the tower's heads.

    Args:
        checkpoint: the folder.
        preset: a name in `INTERFACES`, for cameras in openpi's order.
        unnorm_key: asset whose statistics tell the dimensions; None if there is only one.

    Raises:
        CheckpointError: an unknown preset or a value that no such policy has.
        ArtifactError, StatisticsError: files are missing or malformed.
    """
    values: dict[str, Any]
    if is_lerobot_pi(checkpoint):
        values = lerobot_values(checkpoint, preset)
    else:
        values = dict(vars(openpi_interface(checkpoint, preset, unnorm_key)))
    adaptive = is_adaptive(checkpoint)
    values = {"max_prompt_tokens": PROMPT_TOKENS[adaptive], "prompt": PROMPT[adaptive], **values}
    if preset is None and (checkpoint / CONFIG_NAME).is_file():
        values |= read_policy_config(checkpoint)
    if values.setdefault("adaptive", adaptive) != adaptive:
        kinds = ("pi0.5's", "pi0's") if adaptive else ("pi0's", "pi0.5's")
        raise CheckpointError(
            f"{checkpoint}: the weights are {kinds[0]}, the configuration is {kinds[1]}; bring the "
            "files of one checkpoint together"
        )
    known = {field.name for field in fields(PiConfig)}
    if is_lerobot_pi(checkpoint) and (strange := [n for n in _OF_OPENPI if values.get(n)]):
        raise CheckpointError(
            f"{checkpoint / CONFIG_NAME} says {' and '.join(strange)}, which is computed here for "
            "checkpoints of openpi's layout alone; convert states and actions outside the policy"
        )
    if unknown := sorted(set(values) - known):
        raise CheckpointError(
            f"{checkpoint / CONFIG_NAME} says {unknown}, which no pi0 or pi0.5 has; it may say "
            f"{sorted(known)}"
        )
    return PiConfig(**values)


def assumptions(checkpoint: Path, preset: str | None, config: PiConfig) -> dict[str, object]:
    """Return the fields that neither a checkpoint's files nor a preset say, with their values.

    Args:
        checkpoint: the folder.
        preset: as `load_config`.
        config: from `load_config`.

    Raises:
        ArtifactError: a file is not JSON.
    """
    unsaid = set(_UNSAID_BY_LEROBOT if is_lerobot_pi(checkpoint) else _UNSAID_BY_OPENPI)
    if not config.adaptive:  # the state is not in the prompt
        unsaid.discard("prompt_state_width")
    if (config.action_dim, config.state_dim) != (ALOHA_DIMENSIONS, ALOHA_DIMENSIONS):
        unsaid.discard("adapt_to_pi")
    if preset is not None:
        unsaid.discard("cameras")
    elif (checkpoint / CONFIG_NAME).is_file():
        unsaid -= set(read_policy_config(checkpoint))
    values = {name: value for name, value in vars(config).items() if name in unsaid}
    if "vision_heads" in values and not config.vision_heads:
        values["vision_heads"] = PUBLISHED_HEADS
    return values


def is_pi(checkpoint: Path) -> bool:
    """Whether a folder is of a pi0 or pi0.5 policy, in openpi's layout or LeRobot's.

    Raises:
        ArtifactError: its config.json is not JSON.
    """
    return is_openpi(checkpoint) or is_lerobot_pi(checkpoint)


def is_adaptive(checkpoint: Path) -> bool:
    """Whether weights are pi0.5's, by the names in their headers.

    Raises:
        CheckpointError: they are missing, damaged, or neither policy's.
    """
    keys = {stored.key.removeprefix("model.") for stored in stored_headers(checkpoint)}
    marks = {False: "state_proj.weight", True: "time_mlp_in.weight"}
    found = [adaptive for adaptive, key in marks.items() if key in keys]
    if len(found) != 1:
        raise CheckpointError(
            f"{checkpoint}: weights of pi0 have {marks[False]!r}, those of pi0.5 "
            f"{marks[True]!r}; these have {'both' if found else 'neither'}. pi0-FAST and others "
            "are not supported"
        )
    return found[0]

"""Observation -> model inputs and normalized actions -> robot actions. Torch-free.

The host's policies and the robot's engines share this one implementation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import CheckpointError, InvalidObservation
from qvla_export.shared.frames import FrameSpec, frame_values
from qvla_export.shared.git_lfs import refuse_pointer
from qvla_export.shared.images import ImageSpec, center_crop, pixel_values, resize_like_training
from qvla_export.shared.inputs.history import HistorySpec
from qvla_export.shared.inputs.noise import NoiseSpec
from qvla_export.shared.inputs.prompts import INSTRUCTION, cleaned_prompt
from qvla_export.shared.normalization import Bounds, Statistics
from qvla_export.shared.observation import Observation
from qvla_export.shared.openpi.joint_frame import ROBOT_JOINTS, JointFrame

# Of policies that resize what they see.
_USUAL_FRAME = (224, 224)
# "prompt": the instruction inside `prompt`, from `bos_token_id` to `suffix_token_id`. "line": the
# instruction as it is said, and a new line behind it unless it ends in one; cut where it is too
# long. "cleaned": the instruction on one line inside `prompt`, which may hold the state, too.
# "none": the policy does not read.
Language = Literal["prompt", "line", "cleaned", "none"]
OPENVLA_PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
# What a tokenizer must be able to encode.
_SAMPLE = OPENVLA_PROMPT.format(instruction="pick up the 1st caf\xe9 cup")
# Token of a vocabulary that a policy does without.
NO_TOKEN = -1


@dataclass(frozen=True)
class ProcessorSpec:
    """Everything about inputs and outputs that the weights do not say."""

    # Image names in the order in which the policy was trained on them, primary camera first.
    cameras: tuple[str, ...]
    image: ImageSpec | FrameSpec
    # Actions in a chunk and dimensions of an action.
    horizon: int
    action_dim: int
    # Length of the proprioceptive state; 0 where the policy takes none.
    state_dim: int
    # First token of every prompt.
    bos_token_id: int = NO_TOKEN
    # Token that must end the prompt: 29871 with the Llama-2 vocabulary.
    suffix_token_id: int = NO_TOKEN
    prompt: str = OPENVLA_PROMPT
    # Tokens that a prompt may have, from BOS to the suffix: a longer one costs time and memory, and
    # no policy was trained on one.
    max_prompt_tokens: int = 256
    # Side in pixels of the JPEG + lanczos step applied to frames of another size; 0 for none.
    training_image_size: int = 0
    # Crop the central 90 % of the area, for policies trained with random crops.
    center_crop: bool = False
    # Bins over [-1, 1] that a token head's actions are the centres of; 0 for continuous actions.
    action_bins: int = 0
    # How an instruction becomes tokens.
    language: Language = "prompt"
    # Cameras that an observation may lack; the input `image_mask` then says which are there.
    optional_cameras: tuple[str, ...] = ()
    # What the state is filled up to with zeros; 0: it is as long as it is.
    state_width: int = 0
    # Bins over [-1, 1] that the state's numbers become in the prompt; 0: it is an input.
    state_bins: int = 0
    # Whose joints states and actions are of; `Statistics.action` gives the robot's.
    joints: JointFrame = ROBOT_JOINTS
    # An input of random numbers; None where the policy takes none.
    noise: NoiseSpec | None = None
    # What the prompt repeats of the step before; None where every step is asked alike.
    history: HistorySpec | None = None

    @property
    def pixels(self) -> int:
        """Return how many pixels of a camera the network sees."""
        image = self.image
        return image.pixels if isinstance(image, FrameSpec) else image.size**2

    @property
    def frame_size(self) -> tuple[int, int]:
        """Return height and width of a camera's frame that the policy takes."""
        image = self.image
        return (image.height, image.width) if isinstance(image, FrameSpec) else _USUAL_FRAME


@dataclass(frozen=True)
class Processor:
    """Turns observations into model inputs and normalized actions into robot actions."""

    spec: ProcessorSpec
    statistics: Statistics
    tokenizer: Tokenizer | None = field(repr=False, default=None)

    def feeds(self, observation: Observation) -> dict[str, NDArray[Any]]:
        """Return the named model inputs of one observation, batch size 1.

        `pixel_values` float32 [1, 6 images, S, S], of a `FrameSpec` [1, 3 images, H, W];
        `input_ids` int64 [1, L] where the policy reads; `state` float32 [1, n] where it takes one
        as numbers; `image_mask` bool [1, images] where cameras may be absent; noise by its name.

        Raises:
            InvalidObservation: a camera or the instruction is missing, a picture or the state has
                another size.
        """
        feeds: dict[str, NDArray[Any]] = {"pixel_values": self.pixel_values(observation)[None]}
        if self.spec.language != "none":
            feeds["input_ids"] = self.prompt_ids(observation)[None]
        if self.spec.state_dim and not self.spec.state_bins:
            feeds["state"] = self._filled_state(observation)[None]
        if self.spec.optional_cameras:
            present = [name in observation.images for name in self.spec.cameras]
            feeds["image_mask"] = np.array([present])
        if self.spec.noise is not None:
            feeds[self.spec.noise.name] = self.spec.noise.draw(observation)
        return feeds

    def pixel_values(self, observation: Observation) -> NDArray[np.float32]:
        """Return all images, channels stacked in camera order; shapes as `feeds` has them."""
        absent = [name for name in self.spec.cameras if name not in observation.images]
        needed = [name for name in absent if name not in self.spec.optional_cameras]
        if needed or len(absent) == len(self.spec.cameras):
            raise InvalidObservation(
                f"the policy needs images {list(self.spec.cameras)}, missing {absent}, "
                f"got {sorted(observation.images)}"
            )
        image = self.spec.image
        if isinstance(image, FrameSpec):
            frames = np.zeros((len(self.spec.cameras), 3, image.height, image.width), np.float32)
            for number, name in enumerate(self.spec.cameras):
                if name in observation.images:
                    frame_values(observation.images[name], image, number, frames[number])
            return frames.reshape(-1, image.height, image.width)
        side, planes = image.size, 3 * len(image.means)
        values = np.empty((len(self.spec.cameras), planes, side, side), np.float32)
        for name, out in zip(self.spec.cameras, values, strict=True):
            pixel_values(self._frame(observation.images[name]), image, out)
        return values.reshape(-1, side, side)

    def require_tokenizer(self) -> Tokenizer:
        """Return what makes tokens of words.

        Raises:
            CheckpointError: the policy has no tokenizer.
        """
        if self.tokenizer is None:
            raise CheckpointError("the checkpoint has no tokenizer.json; add it beside config.json")
        return self.tokenizer

    def prompt_ids(self, observation: Observation) -> NDArray[np.int64]:
        """Return the token ids of an observation's prompt; see `input_ids`.  int64 [L]

        Raises:
            InvalidObservation: it has a history that the prompt does not repeat.
        """
        state = self._filled_state(observation) if self.spec.state_bins else None
        if observation.history and self.spec.history is None:
            raise InvalidObservation(
                f"the policy's prompt repeats nothing of the step before, got a history of "
                f"{len(observation.history)} tokens; leave it out"
            )
        return self.input_ids(observation.instruction, state, observation.history)

    def input_ids(
        self,
        instruction: str,
        state: NDArray[np.float32] | None = None,
        history: Sequence[int] = (),
    ) -> NDArray[np.int64]:
        """Return the prompt's token ids; none where the policy does not read.  int64 [L]

        Args:
            instruction: what to do.
            state: normalized, where it is in the prompt.  float32 [n]
            history: tokens chosen at the step before, where the prompt repeats them.

        Raises:
            CheckpointError: the policy has no tokenizer.
            InvalidObservation: the instruction is missing, holds part of the prompt's template, or
                is longer than any that a policy was trained on; the history is none.
        """
        if self.spec.language == "none":
            return np.zeros(0, np.int64)
        if not instruction:
            raise InvalidObservation("an instruction is required, got none; say what to do")
        tokenizer = self.require_tokenizer()
        if self.spec.language == "line":
            return self._line_ids(tokenizer, instruction)
        if self.spec.language == "cleaned":
            text = cleaned_prompt(self.spec.prompt, instruction, state, self.spec.state_bins)
        else:
            bare = without_template(instruction.lower(), self.spec.prompt)
            prompt = self.spec.prompt
            if self.spec.history is not None:
                prompt = self.spec.history.told(prompt, history)
            text = prompt.format(instruction=bare)
        words = tokenizer.encode(text).ids
        if not words or words[0] != self.spec.bos_token_id:
            words = [self.spec.bos_token_id, *words]
        ids = np.asarray(words, dtype=np.int64)
        if self.spec.suffix_token_id != NO_TOKEN:
            ids = with_suffix(ids, self.spec.suffix_token_id)
        if len(ids) > self.spec.max_prompt_tokens:
            raise InvalidObservation(
                f"the prompt may have {self.spec.max_prompt_tokens} tokens, {len(ids)} came of "
                f"the instruction {instruction!r:.60}; say it in fewer words"
            )
        return ids

    def state(self, observation: Observation) -> NDArray[np.float32]:
        """Return the normalized, clipped state.  float32 [n]"""
        bounds = self.statistics.state
        if bounds is None or observation.state.shape != (self.spec.state_dim,):
            raise InvalidObservation(
                f"the policy needs a state of {self.spec.state_dim} numbers, "
                f"got {list(observation.state.shape)}"
            )
        return bounds.normalize(self.spec.joints.policy_state(observation.state))

    def _filled_state(self, observation: Observation) -> NDArray[np.float32]:
        """Return the normalized state, filled up with zeros."""
        return np.pad(
            self.state(observation), (0, max(0, self.spec.state_width - self.spec.state_dim))
        )

    @property
    def command_limits(self) -> Bounds | None:
        """Return the limits of the robot's commands; None where they move with its state."""
        return None if self.spec.joints.relative else self.statistics.action

    def chunk(
        self,
        normalized: NDArray[Any],
        timing_ms: Mapping[str, float] | None = None,
        state: NDArray[np.float32] | None = None,
        tokens: Sequence[float] = (),
    ) -> ActionChunk:
        """Return the robot's actions of a normalized chunk [horizon, dim].

        Relative ones are added to the observation's state, float32 [n]. The tokens that were chosen
        go with them where the next prompt repeats them.

        Raises:
            InvalidObservation: there are such, and no state.
        """
        told = self.statistics.action.unnormalize(normalized)
        actions = self.spec.joints.absolute(told, state)
        history = () if self.spec.history is None else self.spec.history.next(tokens)
        return ActionChunk(
            actions.astype(np.float32), np.asarray(normalized, np.float32), timing_ms or {}, history
        )

    def _line_ids(self, tokenizer: Tokenizer, instruction: str) -> NDArray[np.int64]:
        line = instruction if instruction.endswith("\n") else f"{instruction}\n"
        words = tokenizer.encode(line, add_special_tokens=False).ids
        first = [] if self.spec.bos_token_id == NO_TOKEN else [self.spec.bos_token_id]
        return np.asarray([*first, *words][: self.spec.max_prompt_tokens], np.int64)

    def _frame(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        assert isinstance(self.spec.image, ImageSpec)
        side = self.spec.training_image_size
        # openvla-oft skips the JPEG step for frames that already have the training size.
        if side and image.shape[:2] != (side, side):
            image = resize_like_training(image, side)
        return center_crop(image, side or self.spec.image.size) if self.spec.center_crop else image


def without_template(instruction: str, prompt: str) -> str:
    """Return an instruction without the whole template of the prompt that a client put around it.

    Raises:
        InvalidObservation: part of the template is there, which would be in the prompt twice.
    """
    start, _, end = (part.lower().strip() for part in prompt.partition(INSTRUCTION))
    text = instruction.strip()
    if start and end and text.lower().startswith(start) and text.lower().endswith(end):
        bare = text[len(start) : len(text) - len(end)].strip()
        if not bare:
            raise InvalidObservation(
                f"the instruction {instruction!r:.120} is the prompt's template and nothing else; "
                "send what the robot is to do"
            )
        return bare
    # Without "In:", which an instruction may begin with.
    question = start.partition(":")[2].strip() or start
    if question and question in text.lower():
        raise InvalidObservation(
            f"the instruction {instruction!r:.120} holds part of the prompt's template {prompt!r}; "
            "send what the robot is to do alone"
        )
    return instruction


def with_suffix(ids: NDArray[np.int64], suffix_token_id: int) -> NDArray[np.int64]:
    """Append the suffix token unless the prompt ends in it (OpenVLA `predict_action`)."""
    if ids[-1] == suffix_token_id:
        return ids
    return np.append(ids, np.int64(suffix_token_id))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read any `tokenizers` file, without its stored truncation and padding.

    They are settings of whoever saved it; transformers, too, clears them when it encodes.

    Raises:
        CheckpointError: the file is missing or no tokenizer.
    """
    if not path.is_file():
        raise CheckpointError(f"tokenizer not found: {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Some are read well and cannot encode: a model without the token for what it does not know.
        tokenizer.encode(_SAMPLE)
    except BaseException as error:
        # Not an Exception: what the library's own language calls a panic.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        refuse_pointer(path)
        raise CheckpointError(f"{path} is not a tokenizers file: {reason:.300}") from error
    return tokenizer

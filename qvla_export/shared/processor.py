"""Observation -> model inputs and normalized actions -> robot actions. Torch-free.

The host's policies and the robot's engines share this one implementation.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import ArtifactError, CheckpointError, InvalidObservation
from qvla_export.shared.images import ImageSpec, center_crop, pixel_values, resize_like_training
from qvla_export.shared.normalization import Bounds, Statistics, require_limits
from qvla_export.shared.observation import Observation

_INSTRUCTION = "{instruction}"
# Of a horizon, an action or a state.
_MOST_SIZE = 4096
OPENVLA_PROMPT = "In: What action should the robot take to {instruction}?\nOut:"


@dataclass(frozen=True)
class ProcessorSpec:
    """Everything about inputs and outputs that the weights do not say."""

    # Image names in the order in which the policy was trained on them, primary camera first.
    cameras: tuple[str, ...]
    image: ImageSpec
    # Actions in a chunk and dimensions of an action.
    horizon: int
    action_dim: int
    # Length of the proprioceptive state; 0 where the policy takes none.
    state_dim: int
    # First token of every prompt.
    bos_token_id: int
    # Token that must end the prompt: 29871 with the Llama-2 vocabulary.
    suffix_token_id: int
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


@dataclass(frozen=True)
class Processor:
    """Turns observations into model inputs and normalized actions into robot actions."""

    spec: ProcessorSpec
    statistics: Statistics
    tokenizer: Tokenizer | None = field(repr=False, default=None)

    def feeds(self, observation: Observation) -> dict[str, NDArray[Any]]:
        """Return the named model inputs of one observation, batch size 1.

        `pixel_values` float32 [1, 6 images, S, S]; `input_ids` int64 [1, L];
        `state` float32 [1, n] in [-1, 1] where the policy takes one.

        Raises:
            InvalidObservation: a camera is missing or the state has another length.
        """
        feeds: dict[str, NDArray[Any]] = {
            "pixel_values": self.pixel_values(observation)[None],
            "input_ids": self.input_ids(observation.instruction)[None],
        }
        if self.spec.state_dim:
            feeds["state"] = self.state(observation)[None]
        return feeds

    def pixel_values(self, observation: Observation) -> NDArray[np.float32]:
        """Return all images, channels stacked in camera order.  float32 [6 images, S, S]"""
        missing = [name for name in self.spec.cameras if name not in observation.images]
        if missing:
            raise InvalidObservation(
                f"the policy needs images {list(self.spec.cameras)}, missing {missing}, "
                f"got {sorted(observation.images)}"
            )
        image = self.spec.image
        side, planes = image.size, 3 * len(image.means)
        values = np.empty((len(self.spec.cameras), planes, side, side), np.float32)
        for name, out in zip(self.spec.cameras, values, strict=True):
            pixel_values(self._frame(observation.images[name]), image, out)
        return values.reshape(-1, side, side)

    def input_ids(self, instruction: str) -> NDArray[np.int64]:
        """Return the prompt's token ids, from BOS to the suffix token.  int64 [L]

        Raises:
            CheckpointError: the policy has no tokenizer.
            InvalidObservation: the instruction holds part of the prompt's template, or is longer
                than any that a policy was trained on.
        """
        if self.tokenizer is None:
            raise CheckpointError("the checkpoint has no tokenizer.json; add it beside config.json")
        bare = without_template(instruction.lower(), self.spec.prompt)
        text = self.spec.prompt.format(instruction=bare)
        words = self.tokenizer.encode(text).ids
        if not words or words[0] != self.spec.bos_token_id:
            words = [self.spec.bos_token_id, *words]
        ids = with_suffix(np.asarray(words, dtype=np.int64), self.spec.suffix_token_id)
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
        return bounds.normalize(observation.state)

    def chunk(
        self, normalized: NDArray[Any], timing_ms: Mapping[str, float] | None = None
    ) -> ActionChunk:
        """Return the robot's actions of a normalized chunk [horizon, dim]."""
        actions = self.statistics.action.unnormalize(normalized)
        return ActionChunk(
            actions.astype(np.float32), np.asarray(normalized, np.float32), timing_ms or {}
        )

    def _frame(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
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
    start, _, end = (part.lower().strip() for part in prompt.partition(_INSTRUCTION))
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
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a tokenizers file: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def processor_to_json(processor: Processor) -> dict[str, Any]:
    """Return what a manifest stores of a processor; the tokenizer is a file of its own."""
    statistics = processor.statistics
    parts = {"action": statistics.action, "state": statistics.state}
    return {
        "spec": asdict(processor.spec),
        "statistics": {
            "key": statistics.key,
            **{name: _bounds_to_json(part) for name, part in parts.items() if part is not None},
        },
    }


def processor_from_json(value: Any, tokenizer: Tokenizer | None) -> Processor:
    """Rebuild a processor from a manifest.

    Raises:
        ArtifactError: a field is missing, of the wrong kind or none that a policy can have.
        StatisticsError: limits are not finite and ordered.
    """
    try:
        image = ImageSpec(**{k: _tuples(v) for k, v in value["spec"]["image"].items()})
        spec = ProcessorSpec(
            **{k: _tuples(v) for k, v in value["spec"].items() if k != "image"}, image=image
        )
        stored = value["statistics"]
        state = _bounds_from_json(stored["state"]) if "state" in stored else None
        statistics = Statistics(stored["key"], _bounds_from_json(stored["action"]), state)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the manifest's processor is not readable: {error!r}") from error
    processor = Processor(spec, statistics, tokenizer)
    _require_consistent(processor)
    return processor


def _require_consistent(processor: Processor) -> None:
    """Refuse what a checkpoint would be refused for.

    Raises:
        ArtifactError: sizes, cameras, prompt or limits are none that a policy can have.
    """
    spec, statistics = processor.spec, processor.statistics
    sizes = {
        "horizon": spec.horizon,
        "action_dim": spec.action_dim,
        "state_dim": spec.state_dim,
        "max_prompt_tokens": spec.max_prompt_tokens,
    }
    for name, size in sizes.items():
        if type(size) is not int or not (name != "state_dim") <= size <= _MOST_SIZE:
            raise ArtifactError(
                f"the manifest's {name} must be a whole number up to {_MOST_SIZE}, got {size!r:.40}"
            )
    cameras = spec.cameras
    texts = isinstance(cameras, tuple) and all(isinstance(name, str) for name in cameras)
    if not texts or not cameras or len(set(cameras)) != len(cameras):
        raise ArtifactError(f"the manifest needs cameras of different names, got {cameras!r:.200}")
    if not isinstance(spec.prompt, str) or spec.prompt.count(_INSTRUCTION) != 1:
        raise ArtifactError(f"a prompt holds {_INSTRUCTION} once, got {spec.prompt!r:.120}")
    if set(spec.prompt.replace(_INSTRUCTION, "")) & {*"{}"}:
        raise ArtifactError(f"a prompt has no other braces, got {spec.prompt!r:.120}")
    parts: dict[str, tuple[Bounds | None, int]] = {"action": (statistics.action, spec.action_dim)}
    if spec.state_dim or statistics.state is not None:
        parts["state"] = (statistics.state, spec.state_dim)
    for name, (bounds, size) in parts.items():
        if bounds is None or not bounds.low.shape == bounds.high.shape == bounds.mask.shape == (
            size,
        ):
            raise ArtifactError(f"the manifest's limits of {name} must have {size} entries")
        require_limits(bounds, f"the manifest: {name}")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _bounds_to_json(bounds: Bounds) -> dict[str, list[Any]]:
    return {
        "low": bounds.low.tolist(),
        "high": bounds.high.tolist(),
        "mask": bounds.mask.tolist(),
    }


def _bounds_from_json(value: Any) -> Bounds:
    return Bounds(
        np.asarray(value["low"], np.float64),
        np.asarray(value["high"], np.float64),
        np.asarray(value["mask"], bool),
    )

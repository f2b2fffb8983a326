"""What a bundle's manifest stores of a `Processor`, and a processor of it that a robot may have."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.frames import RESIZES, FrameSpec
from qvla_export.shared.images import ImageSpec, are_channels
from qvla_export.shared.inputs.history import history_from_json
from qvla_export.shared.inputs.noise import noise_from_json
from qvla_export.shared.inputs.prompts import require_prompt
from qvla_export.shared.normalization import Affine, Bounds, Statistics, require_limits
from qvla_export.shared.openpi.joint_frame import ROBOT_JOINTS, JointFrame
from qvla_export.shared.pictures.picture_bounds import MOST_INPUT_SIDE
from qvla_export.shared.policy_interface import MOST_SIZE
from qvla_export.shared.processor import NO_TOKEN, Processor, ProcessorSpec

_MOST_TOKEN = (1 << 31) - 1
# What a policy can have at least and at most; published ones have 256 bins.
_SIZES: Mapping[str, tuple[int, int]] = {
    "horizon": (1, MOST_SIZE),
    "action_dim": (1, MOST_SIZE),
    "state_dim": (0, MOST_SIZE),
    "max_prompt_tokens": (1, MOST_SIZE),
    "bos_token_id": (NO_TOKEN, _MOST_TOKEN),
    "suffix_token_id": (NO_TOKEN, _MOST_TOKEN),
    "training_image_size": (0, MOST_INPUT_SIDE),
    "action_bins": (0, 1 << 16),
    "state_width": (0, MOST_SIZE),
    "state_bins": (0, MOST_SIZE),
}


def processor_to_json(processor: Processor) -> dict[str, Any]:
    """Return what a manifest stores of a processor; the tokenizer is a file of its own."""
    statistics = processor.statistics
    parts = {"action": statistics.action, "state": statistics.state}
    spec = asdict(processor.spec)
    # What says nothing is left out: robots of before know no such fields.
    if processor.spec.joints == ROBOT_JOINTS:
        del spec["joints"]
    if processor.spec.history is None:
        del spec["history"]
    return {
        "spec": spec,
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
        sizes = {k: _tuples(v) for k, v in value["spec"]["image"].items()}
        image = FrameSpec(**sizes) if "height" in sizes else ImageSpec(**sizes)
        nested = ("image", "noise", "joints", "history")
        plain = {k: _tuples(v) for k, v in value["spec"].items() if k not in nested}
        noise = noise_from_json(value["spec"].get("noise"))
        stated = {k: _tuples(v) for k, v in value["spec"].get("joints", {}).items()}
        joints, history = JointFrame(**stated), history_from_json(value["spec"].get("history"))
        spec = ProcessorSpec(**plain, image=image, noise=noise, joints=joints, history=history)
        stored = value["statistics"]
        state = _bounds_from_json(stored["state"]) if "state" in stored else None
        statistics = Statistics(stored["key"], _bounds_from_json(stored["action"]), state)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
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
    for name, (low, high) in _SIZES.items():
        size = getattr(spec, name)
        if type(size) is not int or not low <= size <= high:
            raise ArtifactError(
                f"the manifest's {name} must be a whole number from {low} to {high}, "
                f"got {size!r:.40}"
            )
    if type(spec.center_crop) is not bool:
        raise ArtifactError(
            f"the manifest's center_crop must be true or false, got {spec.center_crop!r:.40}"
        )
    if not isinstance(statistics.key, str):
        raise ArtifactError(f"the manifest's statistics need a name, got {statistics.key!r:.80}")
    cameras = spec.cameras
    texts = isinstance(cameras, tuple) and all(isinstance(name, str) for name in cameras)
    if not texts or not cameras or len(set(cameras)) != len(cameras):
        raise ArtifactError(f"the manifest needs cameras of different names, got {cameras!r:.200}")
    if not isinstance(spec.optional_cameras, tuple) or not {*spec.optional_cameras} < {*cameras}:
        raise ArtifactError(
            f"the manifest's optional cameras must be some of {cameras}, got "
            f"{spec.optional_cameras!r:.200}"
        )
    if spec.language not in ("prompt", "line", "cleaned", "none"):
        raise ArtifactError(f"the manifest's language is unknown: {spec.language!r:.40}")
    if spec.language != "none" and processor.tokenizer is None:
        raise ArtifactError("the bundle's policy reads instructions, and its tokenizer is missing")
    if isinstance(spec.image, FrameSpec):
        _require_frames(spec.image, len(cameras))
    require_prompt(spec.prompt, bool(spec.state_bins))
    spec.joints.require_fits(spec.action_dim, spec.state_dim)
    parts: dict[str, tuple[Bounds | None, int]] = {"action": (statistics.action, spec.action_dim)}
    if spec.state_dim or statistics.state is not None:
        parts["state"] = (statistics.state, spec.state_dim)
    for name, (bounds, size) in parts.items():
        if bounds is None or any(values.shape != (size,) for values in vars(bounds).values()):
            raise ArtifactError(f"the manifest's limits of {name} must have {size} entries")
        require_limits(bounds, f"the manifest: {name}")
        if isinstance(bounds, Affine):
            maps = (bounds.center, bounds.divisor, bounds.factor)
            turns = spec.joints.turns() if name == "action" else 1.0
            if not np.isfinite(maps).all() or (bounds.divisor * turns <= 0).any():
                raise ArtifactError(f"the manifest's map of {name} needs finite, positive sizes")


def _require_frames(image: FrameSpec, cameras: int) -> None:
    sides = (image.height, image.width)
    fits = all(type(n) is int and 1 <= n <= MOST_INPUT_SIDE for n in sides)
    if not fits or image.resize not in RESIZES:
        raise ArtifactError(
            f"the manifest's pictures have sides of 1 to {MOST_INPUT_SIDE} and are resized as one "
            f"of {RESIZES}, got {sides!r:.80} and {image.resize!r:.40}"
        )
    for name, values in (("means", image.means), ("stds", image.stds)):
        if not isinstance(values, tuple) or len(values) != cameras:
            raise ArtifactError(f"the manifest's {name} must be those of {cameras} cameras")
        if not all(are_channels(v) for v in values) or (name == "stds" and 0 in sum(values, ())):
            raise ArtifactError(f"the manifest's {name} need three finite channels each")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _bounds_to_json(bounds: Bounds) -> dict[str, list[Any]]:
    return {name: values.tolist() for name, values in vars(bounds).items()}


def _bounds_from_json(value: Any) -> Bounds:
    numbers = {k: np.asarray(v, bool if k == "mask" else np.float64) for k, v in value.items()}
    return Affine(**numbers) if "center" in numbers else Bounds(**numbers)

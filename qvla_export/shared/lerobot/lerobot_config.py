"""The noun `LeRobotConfig`: what config.json of a checkpoint of LeRobot says of its policy.

Source: lerobot 0.6.1 `configs/policies.py` and the policies' configurations. Nothing is taken from
a default of theirs: defaults change between versions.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qvla_export.shared.errors import ArtifactError, CheckpointError
from qvla_export.shared.json_documents import FOREIGN, Node, read_json

CONFIG = "config.json"
STATE, ACTION = "observation.state", "action"
# Features that a policy of one arm's camera may miss; see `LeRobotConfig.cameras`.
_EMPTY_CAMERA = "observation.images.empty_camera_"
_MODES = ("MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10", "IDENTITY")
_REMEDY = "export it with a version of LeRobot that writes it, or mend the file"
_LARGEST = 8192


@dataclass(frozen=True)
class CameraFeature:
    """A picture that a policy takes."""

    # LeRobot's name of it: "observation.images.top".
    key: str
    # Of the pictures it was trained on.
    height: int
    width: int


@dataclass(frozen=True)
class LeRobotConfig:
    """Features of a policy and how they are normalized; families read the rest from `node`."""

    # The whole document.
    node: Node
    # Kind of policy: "act", "smolvla".
    type: str
    # The policy's name of a camera, the last part of its key -> the feature, in their order.
    # Cameras that upstream fills with blank pictures are not among them.
    cameras: Mapping[str, CameraFeature]
    # How many cameras upstream fills with blank pictures.
    blank_cameras: int
    state_dim: int
    action_dim: int
    # "VISUAL", "STATE", "ACTION" -> how such features are normalized.
    modes: Mapping[str, str]


def is_lerobot(checkpoint: Path) -> bool:
    """Whether a folder's config.json is of a policy of LeRobot.

    Raises:
        ArtifactError: it is not JSON.
    """
    if not (checkpoint / CONFIG).is_file():
        return False
    raw = read_json(checkpoint / CONFIG, "model configuration", FOREIGN)
    fields = isinstance(raw, dict) and isinstance(raw.get("input_features"), dict)
    return fields and isinstance(raw.get("type"), str) and "model_type" not in raw


def read_lerobot_config(checkpoint: Path, preset: str | None = None) -> LeRobotConfig:
    """Read config.json of a LeRobot checkpoint.

    Args:
        checkpoint: its folder.
        preset: must be None: nothing is left to say.

    Raises:
        CheckpointError: a preset, an adapter, a feature that no policy here takes.
        ArtifactError: a field is missing or malformed.
    """
    path = checkpoint / CONFIG
    if preset is not None:
        raise CheckpointError(
            f"{path} says what the policy sees and returns; leave --preset {preset} out"
        )
    node = Node(read_json(path, "model configuration", FOREIGN), str(path), remedy=_REMEDY)
    if node.has("use_peft") and node.field("use_peft").value:
        raise CheckpointError(
            f"{path}: use_peft: the weights are an adapter of another model; merge it with peft's "
            "merge_and_unload and save the policy again"
        )
    inputs = {key: _kind(feature) for key, feature in node.field("input_features").fields().items()}
    outputs = node.field("output_features").fields()
    if odd := [k for k, kind in inputs.items() if kind != "VISUAL" and k != STATE]:
        raise CheckpointError(
            f"{path}: the policy takes {', '.join(odd)}, which no policy here does; train it on "
            "pictures and observation.state"
        )
    if list(outputs) != [ACTION]:
        raise CheckpointError(f"{path}: output_features must be {ACTION!r}, got {[*outputs]}")
    visual = [key for key, kind in inputs.items() if kind == "VISUAL"]
    shapes = node.field("input_features")
    seen = [key for key in visual if not key.startswith(_EMPTY_CAMERA)]
    features = {key: _camera(key, shapes.field(key)) for key in seen}
    return LeRobotConfig(
        node,
        node.field("type").text(),
        {_name(key, seen): feature for key, feature in features.items()},
        len(visual) - len(seen),
        _length(shapes.field(STATE)) if STATE in inputs else 0,
        _length(outputs[ACTION]),
        read_modes(node.field("normalization_mapping")),
    )


def _kind(feature: Node) -> str:
    return feature.field("type").text()


def _name(key: str, keys: list[str]) -> str:
    """The last part of a key, as data sets' columns are named; the key where that is ambiguous."""
    counts = Counter(other.rpartition(".")[2] for other in keys)
    last = key.rpartition(".")[2]
    return last if counts[last] == 1 else key


def _camera(key: str, feature: Node) -> CameraFeature:
    sizes = [one.whole(1, _LARGEST) for one in feature.field("shape").elements()]
    if len(sizes) != 3 or sizes[0] != 3:
        raise feature.field("shape").wrong("a picture's shape is [3, height, width]")
    return CameraFeature(key, sizes[1], sizes[2])


def _length(feature: Node) -> int:
    sizes = [one.whole(1, _LARGEST) for one in feature.field("shape").elements()]
    if len(sizes) != 1:
        raise feature.field("shape").wrong("a vector's shape is [n]")
    return sizes[0]


def read_modes(node: Node) -> dict[str, str]:
    """Return how features are normalized: "VISUAL", "STATE", "ACTION" -> mode.

    Raises:
        ArtifactError: it does not say so, or names a mode that there is not.
    """
    modes = {}
    for kind, mode in node.fields().items():
        if mode.text() not in _MODES:
            raise mode.wrong(f"a normalization is one of {', '.join(_MODES)}")
        modes[kind] = mode.text()
    return modes


def require_policy_type(config: LeRobotConfig, expected: str) -> None:
    """Refuse a configuration of another kind of policy.

    Raises:
        ArtifactError: naming both.
    """
    if config.type != expected:
        raise ArtifactError(f"{config.node.file}: type must be {expected!r}, it is {config.type!r}")


def require_built(node: Node, built: Mapping[str, tuple[object, str]]) -> None:
    """Refuse a configuration that says something that is not computed here.

    Args:
        node: the document.
        built: field -> the only value that is computed, and what it means.

    Raises:
        CheckpointError: naming field, meaning and value.
    """
    for name, (value, meaning) in built.items():
        if (stated := node.field(name).value) != value:
            raise CheckpointError(
                f"{node.file}: {name} ({meaning}) is {stated!r}, which is not built here; "
                f"{value!r} is"
            )

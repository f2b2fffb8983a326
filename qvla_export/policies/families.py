"""Families of policies: recognize a checkpoint folder from its files and open it.

The one place, besides training, that knows families by name; imports no torch until it opens one.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import find_geometry
from qvla_export.policies.act.family import ActFamily
from qvla_export.policies.adapters import model_config, require_merged
from qvla_export.policies.backbone import Backbone, is_backbone, named_backbone
from qvla_export.policies.backbones.pictures import PictureBackbone
from qvla_export.policies.backbones.texts import SMOLLM2_135M, TextBackbone
from qvla_export.policies.oft.family import OftFamily
from qvla_export.policies.openvla.family import OpenVlaFamily
from qvla_export.policies.pi.family import PiFamily
from qvla_export.policies.prismatic.pretrained import DINOV2_SMALL
from qvla_export.policies.smolvla.family import SmolVlaFamily
from qvla_export.policies.univla.family import UniVlaFamily
from qvla_export.shared.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from qvla_export.policies.base import Policy


class Family(Protocol):
    """What is particular to one kind of checkpoint, without a checkpoint at hand."""

    # Its folder's name.
    name: str
    # What its config.json calls itself.
    model_type: str
    # Published sizes that it can write with random weights, see `latency_model.published_sizes`.
    sizes: tuple[str, ...]

    def recognizes(self, checkpoint: Path) -> bool:
        """Whether a folder, which has a config.json, is a checkpoint of this family."""
        ...

    def describe(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> str:
        """Say in one line what a checkpoint was found to be, and every field that is assumed.

        Raises:
            CheckpointError, ArtifactError, StatisticsError: it does not say its interface.
        """
        ...

    def inputs(self, checkpoint: Path, preset: str | None) -> PolicyInputs:
        """Return what decides the rows of a checkpoint's layers; reads no weights.

        Raises:
            CheckpointError: nothing says it, or the preset is unknown.
        """
        ...

    def can_stay_on_disk(self, checkpoint: Path, preset: str | None) -> bool:
        """Whether a policy can be opened with its weights left on disk."""
        ...

    def open(
        self, checkpoint: Path, unnorm_key: str | None, preset: str | None, resident: bool
    ) -> "Policy":
        """Load a checkpoint folder; see `load_policy`."""
        ...

    def check(self, checkpoint: Path, unnorm_key: str | None, preset: str | None) -> None:
        """Refuse what `open` would refuse, without the weights in memory.

        Raises:
            CheckpointError, StatisticsError: as `load_policy`.
        """
        ...

    def check_files(self, checkpoint: Path, preset: str | None) -> None:
        """Refuse what names and headers of files say `open` would refuse; needs no torch.

        Raises:
            CheckpointError: as `load_policy`.
        """
        ...

    def write_smoothed(
        self, checkpoint: Path, output: Path, factors: "Mapping[str, Tensor]", keep_types: bool
    ) -> None:
        """Copy a checkpoint with some parameters multiplied, atomically.

        Args:
            checkpoint: the folder to copy.
            output: the folder to write; an existing one is replaced.
            factors: parameter name -> what it is multiplied by, see `smoothed_tensors`.
            keep_types: store products in their tensors' own types, else in float32.

        Raises:
            CheckpointError: a parameter is not stored there, or the folders are the same.
        """
        ...

    def write_random_checkpoint(
        self,
        output: Path,
        size: str,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write a checkpoint of a published size with random weights.

        Args:
            output: the folder to create or replace.
            size: one of `sizes`.
            on_progress: called with (bytes written, bytes in all).
        """
        ...


FAMILIES: tuple[Family, ...] = (
    OftFamily(),
    OpenVlaFamily(),
    PiFamily(),
    UniVlaFamily(),
    ActFamily(),
    SmolVlaFamily(),
)
# Published networks that are measured by themselves; no family, for they have no actions. Texts are
# short, so that many fit into an hour of one core.
BACKBONES: Mapping[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        PictureBackbone("dinov2-small", DINOV2_SMALL, size=140),
        TextBackbone("smollm2-135m", SMOLLM2_135M, size=64),
    )
}


def find_backbone(name: str) -> Backbone:
    """Return a published network by its name.

    Raises:
        CheckpointError: there is none.
    """
    if name not in BACKBONES:
        raise CheckpointError(f"a backbone is one of {', '.join(BACKBONES)}, got {name!r}")
    return BACKBONES[name]


def recognize(checkpoint: Path) -> Family:
    """Return the family of a checkpoint folder.

    Raises:
        CheckpointError: there is no such folder, it is of no family known here, or it holds an
            adapter that is not merged.
        ArtifactError: its config.json is not JSON.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"checkpoint folder not found: {checkpoint}")
    require_merged(checkpoint)
    if not model_config(checkpoint).is_file():
        raise CheckpointError(f"{checkpoint} has no config.json; is it a whole checkpoint?")
    if is_backbone(checkpoint):
        raise CheckpointError(
            f"{checkpoint} stands for a published network without actions: qvla bench weights "
            "measures it, and no policy is made of it"
        )
    for family in FAMILIES:
        if family.recognizes(checkpoint):
            return family
    types = " or ".join(repr(name) for name in dict.fromkeys(f.model_type for f in FAMILIES))
    raise CheckpointError(
        f"{checkpoint}/config.json is of no known model_type (LeRobot: type); known: {types}"
    )


def describe_checkpoint(
    checkpoint: Path, unnorm_key: str | None = None, preset: str | None = None
) -> str:
    """Say in one line what a folder was found to be, and every field that is assumed.

    Args:
        checkpoint, unnorm_key, preset: as `load_policy`.

    Raises:
        CheckpointError, ArtifactError, StatisticsError: as `recognize` and `Family.describe`.
    """
    return recognize(checkpoint).describe(checkpoint, unnorm_key, preset)


def load_policy(
    checkpoint: Path | str,
    unnorm_key: str | None = None,
    preset: str | None = None,
    resident: bool = True,
) -> "Policy":
    """Load a checkpoint folder of any family, or a backbone by the folder that stands for it.

    Args:
        checkpoint: the folder in its published layout.
        unnorm_key: data set whose statistics un-normalize actions; may be None if only one.
        preset: "libero", "aloha" or "bridge"; None reads `qvla_policy.json` beside the weights.
        resident: False leaves the weights on disk: the policy can be measured and exported part by
            part, in the memory of one part, but not run by torch as a whole.

    Raises:
        CheckpointError, StatisticsError: what is wrong and what is available.
    """
    folder = Path(checkpoint)
    if is_backbone(folder):
        return named_backbone(folder, BACKBONES).load()
    return recognize(folder).open(folder, unnorm_key, preset, resident)


def family_with_size(size: str) -> Family:
    """Return the family that a published size belongs to.

    Raises:
        QvlaError: the size is unknown; the message lists those there are and the nearest.
    """
    find_geometry(size)
    return next(family for family in FAMILIES if size in family.sizes)

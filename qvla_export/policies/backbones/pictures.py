"""A vision tower by itself as a `Policy`: its features of a picture are the action."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from qvla_export.policies.backbone import Backbone
from qvla_export.policies.prismatic.pretrained import PretrainedTower

if TYPE_CHECKING:
    from qvla_export.policies.backbones.picture_policy import PicturePolicy


@dataclass(frozen=True)
class PictureBackbone(Backbone):
    """A DINOv2 tower, whole."""

    file: PretrainedTower

    reads: ClassVar[Literal["picture", "text"]] = "picture"
    camera: ClassVar[str] = "image"
    output: ClassVar[str] = "features of the class token and all patches behind the last norm"

    def load(self) -> "PicturePolicy":
        """Return the tower as a policy."""
        from qvla_export.policies.backbones.picture_policy import picture_policy

        return picture_policy(self.file, self.camera, self.size, self.digest)

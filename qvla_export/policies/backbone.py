"""The noun `Backbone`: a published network whose output stands for the action. Imports no torch.

Its weights lie in an installed package. What stands for its checkpoint is a folder with a
config.json that names the package's file and the size of what the network is fed, so that whatever
takes a checkpoint and measures it takes this one, too.
"""

import abc
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qvla_export.policies.model_type import read_model_type
from qvla_export.policies.package_file import PackageFile
from qvla_export.shared.artifacts import new_folder, read_json, require_same, write_json
from qvla_export.shared.errors import CheckpointError

if TYPE_CHECKING:
    from qvla_export.policies.whole_policy import WholePolicy

# What its config.json calls itself.
MODEL_TYPE = "qvla-backbone"
_CONFIG = "config.json"


@dataclass(frozen=True)
class Backbone(abc.ABC):
    """A published network: where its weights are, what it is fed."""

    name: str
    file: PackageFile
    # Side of a picture in pixels, or tokens of a text.
    size: int

    # What one observation is.
    reads: ClassVar[Literal["picture", "text"]]
    # Whose picture an observation has; beside a text it is one pixel of nothing.
    camera: ClassVar[str]
    # What its output is.
    output: ClassVar[str]

    @abc.abstractmethod
    def load(self) -> "WholePolicy":
        """Return the network as a policy.

        Raises:
            CheckpointError: as `PackageFile.path`.
        """

    @property
    def digest(self) -> str:
        """Return the SHA-256 over all that says what it computes."""
        return hashlib.sha256(json.dumps(self.stated(), sort_keys=True).encode()).hexdigest()

    def stated(self) -> dict[str, Any]:
        """Return what the folder's config.json holds."""
        return {
            "model_type": MODEL_TYPE,
            "backbone": self.name,
            "size": self.size,
            "file": asdict(self.file),
        }

    def put(self, folder: Path) -> None:
        """Write the folder that stands for its checkpoint, unless it is there.

        Raises:
            CheckpointError: its package is not installed.
            ArtifactMismatch: the folder is another one's.
        """
        self.file.path()
        if (folder / _CONFIG).is_file():
            remedy = f"Remove {folder}, or name another run folder."
            stated = read_json(folder / _CONFIG, "backbone")
            require_same("network and run", str(stated), str(self.stated()), remedy)
            return
        with new_folder(folder) as written:
            write_json(written / _CONFIG, self.stated())


def is_backbone(folder: Path) -> bool:
    """Say whether a folder stands for a backbone's checkpoint."""
    return (folder / _CONFIG).is_file() and read_model_type(folder) == MODEL_TYPE


def named_backbone(folder: Path, known: Mapping[str, Backbone]) -> Backbone:
    """Return the backbone that a folder stands for.

    Raises:
        CheckpointError: it names none that is known here, or another file or size of it.
    """
    stated = read_json(folder / _CONFIG, "backbone")
    for backbone in known.values():
        if stated == backbone.stated():
            return backbone
    raise CheckpointError(
        f"{folder / _CONFIG} names no backbone as it is known here, which are "
        f"{', '.join(known)}; make it anew with: qvla bench weights"
    )

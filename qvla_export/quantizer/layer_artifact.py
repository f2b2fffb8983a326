"""Artifacts of one file that hold arrays for every layer, and where those come from. numpy only."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from qvla_export.shared.artifacts import require_fields
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.tensor_files import (
    StoredLayers,
    TensorArtifact,
    Tensors,
    layer_tensors,
    open_tensor_file,
)


@dataclass(frozen=True)
class FileKind:
    """What a file of layers is."""

    # Name and version of the format.
    form: str
    # The artifact in words, and what makes it anew.
    what: str
    remedy: str
    # Dataclass of a layer's arrays.
    layer: type[Any]
    # Whether layers are read from the file each time that someone asks for them.
    stays_on_disk: bool = False


@dataclass(frozen=True)
class LayerArtifact(TensorArtifact):
    """Layer name -> arrays, and provenance; a subclass adds its fields, `made_with` among them.

    Its file holds `layers` as tensors and all other fields as JSON, `made_with` as "versions".
    """

    kind: ClassVar[FileKind]

    # Layer name -> its arrays, in forward order.
    layers: Mapping[str, Any]

    def _tensors(self) -> Tensors:
        return layer_tensors(self.layers)

    def _provenance(self) -> Mapping[str, Any]:
        own = {key: getattr(self, name) for name, key in self._keys().items()}
        return {"format": self.kind.form, "layers": list(self.layers), **own}

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the artifact.

        Raises:
            ArtifactError: the file is missing, truncated, damaged or of another kind; the message
                names the command that makes it anew.
        """
        kind, keys = cls.kind, cls._keys()
        tensors, value = open_tensor_file(path, kind.form, kind.what, kind.remedy)
        require_fields(value, ("layers", *keys.values()), f"{kind.what} {path}")
        try:
            stored = StoredLayers(tensors, value["layers"], kind.layer)
            own = {name: value[key] for name, key in keys.items()}
            if not kind.stays_on_disk:
                return cls(layers={name: stored[name] for name in stored}, **own)
            for name in stored:
                stored[name]  # made once, so that what is wrong with a layer is said here
            return cls(layers=stored, **own)
        except (KeyError, TypeError, ValueError, QvlaError) as error:
            raise ArtifactError(
                f"{kind.what} {path}: the file is damaged: {error}; {kind.remedy}"
            ) from error

    @classmethod
    def _keys(cls) -> dict[str, str]:
        """Field -> its key in the file."""
        names = [field.name for field in fields(cls) if field.name != "layers"]
        return {name: "versions" if name == "made_with" else name for name in names}

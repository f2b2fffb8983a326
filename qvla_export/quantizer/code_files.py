"""Codes of a plan while they are made: a file for each layer, joined when the last is there.

What a killed run had finished is whole, and known to be of the same plan and moments. numpy only.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qvla_export.quantizer.rounding import RoundedLayer, Rounding
from qvla_export.shared.artifacts import remove_leftovers
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.tensor_files import StoredLayers, layer_tensors

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CodeFiles:
    """A folder with the codes of some layers, one file each."""

    folder: Path
    # All layers, in forward order.
    names: Sequence[str]
    plan_digest: str
    moments_digest: str

    def save(self, name: str, layer: RoundedLayer) -> None:
        """Write a layer's codes, atomically."""
        Rounding({name: layer}, self.plan_digest, self.moments_digest).save(self._path(name))

    def finished(self) -> list[str]:
        """Return the layers whose codes are there and whole; files of others' are removed."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if not path.name.startswith("."):
                    remove_leftovers(path)
        return [name for name in self.names if self._load(name) is not None]

    def joined(self) -> Rounding:
        """Return the codes of all layers, each read on demand.

        Raises:
            ArtifactError: some are missing.
        """
        found = {name: self._load(name) for name in self.names}
        missing = [name for name, part in found.items() if part is None]
        if missing:
            raise ArtifactError(f"{self.folder}: no codes of {missing}; make them: qvla round")
        tensors = _Joined([layer_tensors(part.layers) for part in found.values() if part])
        layers = StoredLayers(tensors, self.names, RoundedLayer)
        return Rounding(layers, self.plan_digest, self.moments_digest)

    def remove(self) -> None:
        """Remove the folder, once the joined codes are safe."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.names.index(name):05d}.safetensors"

    def _load(self, name: str) -> Rounding | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            part = Rounding.load(path)
        except ArtifactError as error:
            _LOG.warning("making the codes of %s anew: %s", name, error)
        else:
            own = list(part.layers), part.plan_digest, part.moments_digest
            if own == ([name], self.plan_digest, self.moments_digest):
                return part
        path.unlink()
        return None


class _Joined(Mapping[str, NDArray[Any]]):
    """Tensors of several files, each read on demand."""

    def __init__(self, parts: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        self._places = {name: part for part in parts for name in part}

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._places[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

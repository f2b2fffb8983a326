"""The noun `RobotSystem`: a Python and the libraries of a system below it; one per JetPack."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

ARCHITECTURE = "aarch64"
# The oldest glibc that PyPI's wheels for aarch64 are made for.
_OLDEST_GLIBC = 17


@dataclass(frozen=True)
class RobotSystem:
    """What a runtime may count on: an aarch64 Linux, its Python and its libraries' versions."""

    # "JetPack 6".
    name: str
    # Minor of its CPython 3.
    minor: int
    # Library's prefix of symbol versions -> newest that the system has.
    limits: Mapping[str, tuple[int, ...]]

    @property
    def python(self) -> str:
        """Version of its Python, "3.10"."""
        return f"3.{self.minor}"

    @property
    def abi(self) -> str:
        """Name of its Python in tags of wheels, "cp310"."""
        return f"cp3{self.minor}"

    @property
    def platforms(self) -> tuple[str, ...]:
        """Tags of the platforms whose wheels it runs, newest first."""
        newest = self.limits["GLIBC"][1]
        tags = [f"manylinux_2_{n}_{ARCHITECTURE}" for n in range(newest, _OLDEST_GLIBC - 1, -1)]
        return (*tags, f"manylinux2014_{ARCHITECTURE}", f"linux_{ARCHITECTURE}")

    def with_python(self, minor: int) -> "RobotSystem":
        """Return the system with another Python."""
        return replace(self, minor=minor)

    def to_pex(self) -> dict[str, Any]:
        """Return it as PEX describes a platform: tags of wheels, best first, and markers."""
        from packaging.tags import compatible_tags, cpython_tags

        version = (3, self.minor)
        tags = [
            *cpython_tags(version, [self.abi], self.platforms),
            *compatible_tags(version, self.abi, self.platforms),
        ]
        markers = {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": ARCHITECTURE,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }
        listed = [str(tag) for tag in tags]
        return {"path": None, "compatible_tags": listed, "marker_environment": markers}


# Ubuntu 22.04 and 24.04: glibc, and the libstdc++ of GCC 12 and 14.
JETPACKS = {
    "6": RobotSystem(
        "JetPack 6", 10, {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}
    ),
    "7": RobotSystem(
        "JetPack 7", 12, {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15)}
    ),
}

"""Look through what a robot is to run before it gets there: every native file, by its first bytes.

Names of wheels are promises; what counts is what the loader on the robot will read.
"""

import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qvla_export.pipeline.runtime.elf import MAGIC, DamagedFile, read_native_file
from qvla_export.pipeline.runtime.robots import ARCHITECTURE, RobotSystem
from qvla_export.shared.errors import QvlaError

_PROGRAM = re.compile(r"(?:[^/]+/)*bin/python3\.(\d{1,2})")
# A native file is read into memory; ONNX Runtime's is of 25 MB.
_MOST_NATIVE_BYTES = 1 << 30


class RefusedWheel(QvlaError):
    """A file would not run on the robot, or is not the one that the lock names."""


@dataclass(frozen=True)
class Scan:
    """What a scan found; everything in it is for the robot's system."""

    native_files: int
    # Library -> newest version of its symbols that a native file needs.
    needs: dict[str, tuple[int, ...]]

    @staticmethod
    def sum(scans: Iterable["Scan"]) -> "Scan":
        """Return one scan of all."""
        files, needs = 0, dict[str, tuple[int, ...]]()
        for scan in scans:
            files += scan.native_files
            for library, version in scan.needs.items():
                needs[library] = max(needs.get(library, ()), version)
        return Scan(files, needs)


def scan_zip(path: Path, system: RobotSystem) -> Scan:
    """Look through a wheel, or a finished runtime.

    Raises:
        RefusedWheel: it is a source distribution or no archive, a native file of it is for another
            architecture, or needs newer libraries than the system has.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _scan(path.name, _zip_members(archive), system)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise RefusedWheel(f"{path.name} is damaged: {error}") from None


def scan_wheel(path: Path, system: RobotSystem) -> Scan:
    """Look through a wheel; what is none would have to be compiled.

    Raises:
        RefusedWheel: as `scan_zip`.
    """
    if path.suffix != ".whl":
        raise RefusedWheel(
            f"{path.name} is no wheel: it would have to be compiled, which neither this machine "
            "nor a robot does; take a version that has wheels for aarch64"
        )
    return scan_zip(path, system)


def scan_python(path: Path, system: RobotSystem) -> tuple[Scan, int]:
    """Look through a tar archive of a Python; return the scan, and the minor of its version.

    Raises:
        RefusedWheel: it is no such archive, or not for the system.
    """
    try:
        with tarfile.open(path) as archive:
            minors = {
                int(found[1])
                for member in archive.getmembers()
                if member.isfile() and (found := _PROGRAM.fullmatch(member.name.removeprefix("./")))
            }
            if len(minors) != 1:
                raise RefusedWheel(
                    f"{path} must hold one program bin/python3.N, found {sorted(minors) or 'none'}"
                )
            return _scan(path.name, _tar_members(archive), system), minors.pop()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise RefusedWheel(f"{path} is no tar archive of a Python: {error}") from None


def _scan(archive: str, members: Iterator[tuple[str, bytes]], system: RobotSystem) -> Scan:
    files, newest = 0, dict[str, tuple[int, ...]]()
    for name, data in members:
        files += 1
        for library, version in _require_fit(f"{name} of {archive}", data, system).items():
            newest[library] = max(newest.get(library, ()), version)
    return Scan(files, newest)


def _require_fit(what: str, data: bytes, system: RobotSystem) -> dict[str, tuple[int, ...]]:
    try:
        file = read_native_file(data)
    except DamagedFile as error:
        raise RefusedWheel(f"{what} cannot be judged: {error}") from None
    if file.architecture != ARCHITECTURE:
        raise RefusedWheel(f"{what} is for {file.architecture}; {system.name} is {ARCHITECTURE}")
    for library, version in file.needs.items():
        if version > system.limits[library]:
            raise RefusedWheel(
                f"{what} needs {library}_{dotted(version)}; {system.name} has "
                f"{dotted(system.limits[library])}"
            )
    return file.needs


def dotted(version: tuple[int, ...]) -> str:
    """Return a version as people write it: "2.35"."""
    return ".".join(map(str, version))


def _zip_members(archive: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    for member in archive.infolist():
        with archive.open(member) as opened:
            if opened.read(len(MAGIC)) == MAGIC:
                yield member.filename, MAGIC + opened.read(_MOST_NATIVE_BYTES)


def _tar_members(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive.getmembers():
        opened = archive.extractfile(member) if member.isfile() else None
        if opened is not None and opened.read(len(MAGIC)) == MAGIC:
            yield member.name, MAGIC + opened.read(_MOST_NATIVE_BYTES)

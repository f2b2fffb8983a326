"""Bring together the wheels of a runtime: QVLA's own, and those that a lock names by digest."""

import email
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from qvla_export.pipeline.runtime.robots import RobotSystem
from qvla_export.pipeline.runtime.scan import RefusedWheel
from qvla_export.pipeline.runtime.tools import FailedTool, run_tool
from qvla_export.shared.artifacts import sha256_file

CONSTRAINTS = "constraints.txt"
# uv knows no newer one.
_NEWEST_GLIBC = (2, 40)
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^]]*\])?==(\S+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def build_own_wheel(source: Path, folder: Path) -> Path:
    """Build the wheel of a checkout, outside of it.

    Raises:
        FailedTool: it is no checkout of QVLA, or does not build.
    """
    if not (source / "pyproject.toml").is_file():
        raise FailedTool(
            f"{source} is no checkout of QVLA: it has no pyproject.toml; give one with --source"
        )
    copy = folder / "source"
    for entry in sorted(source.iterdir()):
        if (entry / "__init__.py").is_file():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(entry, copy / entry.name, ignore=ignored)
    for pattern in ("pyproject.toml", "README*", "LICENSE*"):
        for file in source.glob(pattern):
            shutil.copyfile(file, copy / file.name)
    wheels = folder / "own"
    arguments = ("build", "--quiet", "--wheel", "--out-dir", wheels, copy)
    run_tool("uv", arguments, f"the wheel of {source} cannot be built")
    (wheel,) = wheels.glob("*.whl")
    return wheel


def requirements(wheel: Path, extra: str) -> str:
    """Return what a wheel needs with one of its extras and no other, one requirement a line."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    needed = (one.partition("; extra == ") for one in metadata.get_all("Requires-Dist") or [])
    return "".join(f"{one}\n" for one, _, of in needed if of.strip("\"'") in ("", extra))


def write_lock(needed: str, constraints: Path | None, system: RobotSystem, lock: Path) -> None:
    """Choose versions of everything for a robot and name every file of them by its digest.

    Args:
        needed: requirements, one a line.
        constraints: file of versions that are taken where they are needed.
        system: the robot's.
        lock: the file to write.

    Raises:
        FailedTool: something has no wheels for the robot.
    """
    given = lock.with_suffix(".in")
    given.write_text(needed)
    glibc = min(system.limits["GLIBC"], _NEWEST_GLIBC)
    arguments = (
        *("pip", "compile", given, "--quiet", "--generate-hashes", "--only-binary", ":all:"),
        *("--no-header", "--no-annotate", "--python-version", system.python),
        *("--python-platform", f"aarch64-manylinux_{glibc[0]}_{glibc[1]}", "--output-file", lock),
        *(("--constraints", constraints) if constraints is not None else ()),
    )
    failure = f"no set of wheels fits {system.name} with Python {system.python}"
    run_tool("uv", arguments, failure)


def read_lock(lock: Path) -> dict[str, str]:
    """Return the versions that a lock names by their distribution's name.

    Raises:
        RefusedWheel: a requirement is not pinned, or has no digest.
    """
    versions = {}
    for line in lock.read_text(errors="replace").replace("\\\n", " ").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        pinned = _REQUIREMENT.match(line)
        if pinned is None or not _HASH.search(line):
            raise RefusedWheel(
                f"{lock}: {line[:80]!r} must be name==version with --hash=sha256:...; "
                "make the lock again, without --lock"
            )
        versions[_normal(pinned[1])] = pinned[2]
    return versions


def fetch_wheels(lock: Path, system: RobotSystem, folder: Path) -> tuple[Path, ...]:
    """Fetch what a lock names; return the wheels.

    Raises:
        FailedTool: one is not there for the robot, or is not the one with the digest.
        RefusedWheel: what was fetched is not what the lock names.
    """
    platforms = [word for tag in system.platforms for word in ("--platform", tag)]
    abis = [word for tag in (system.abi, "abi3", "none") for word in ("--abi", tag)]
    arguments = (
        *("download", "--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps"),
        *("--only-binary", ":all:", "--implementation", "cp", "--python-version", system.python),
        *(*abis, *platforms, "--requirement", lock, "--dest", folder),
    )
    failure = f"the wheels of {lock} cannot be fetched for {system.name}"
    run_tool("pip", arguments, failure)
    wheels = tuple(sorted(folder.iterdir()))
    require_locked(wheels, lock)
    return wheels


def require_locked(wheels: Sequence[Path], lock: Path) -> None:
    """Check that wheels are those of a lock, each by its digest, and that none is missing.

    Raises:
        RefusedWheel: naming the first that is not.
    """
    allowed = set(_HASH.findall(lock.read_text(errors="replace")))
    for wheel in wheels:
        if sha256_file(wheel) not in allowed:
            raise RefusedWheel(f"{wheel.name} is not in {lock}: no such digest; fetch it again")
    # It was made for this robot: all of it applies.
    missing = set(read_lock(lock)) - {_normal(w.name.split("-")[0]) for w in wheels}
    if missing:
        raise RefusedWheel(f"{lock} names {sorted(missing)[:8]}, whose wheels are missing")


def _normal(name: str) -> str:
    """Return a distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()

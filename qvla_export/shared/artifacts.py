"""Artifacts on disk: atomic writes, digests and provenance. Standard library only."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qvla_export.shared.errors import ArtifactError, ArtifactMismatch
from qvla_export.shared.json_documents import read_json as read_json

# A bundle's files by name, here for those who need no more of it: to go back loads no numpy.
MANIFEST = "manifest.json"
PLAN = "plan.json"
TOKENIZER = "tokenizer.json"
GOLDEN = "golden.safetensors"

# Versions recorded beside every artifact: what can change its numbers.
_RECORDED = ("numpy", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "mujoco")


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sha256_tree(root: Path, names: Iterable[str] | None = None) -> str:
    """Return one digest of the named files (default: all) below a folder, names included."""
    if names is None:
        names = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{sha256_file(root / name)}\n".encode())
    return digest.hexdigest()


def set_fields(value: Any, *optional: str) -> dict[str, Any]:
    """Return a dataclass as JSON, without the optional fields that are not set.

    Args:
        value: the dataclass.
        optional: fields that are left out where they are false.
    """
    return {k: v for k, v in asdict(value).items() if v or k not in optional}


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename."""
    write_pieces(path, [data])


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file whole or not at all from pieces that follow each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given; a file that says the same is left alone."""
    data = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` only if the block succeeds.

    An existing folder at `path` is replaced after the new one is complete and synced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path)))
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            _let_read(entry)
            if entry.is_dir():
                sync_folder(entry)
            elif entry.is_file():
                with entry.open("rb") as opened:
                    os.fsync(opened.fileno())
        sync_folder(temporary)
        temporary.chmod(0o755)
        if path.exists():
            stale = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path)))
            path.rename(stale / "old")
            try:
                temporary.rename(path)
            except BaseException:
                (stale / "old").rename(path)
                raise
            shutil.rmtree(stale)
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _let_read(path: Path) -> None:
    """Let other accounts read what an artifact holds: libraries write for their own alone."""
    if not path.is_symlink():
        path.chmod(stat.S_IMODE(path.stat().st_mode) | (0o555 if path.is_dir() else 0o444))


def versions(*also: str) -> dict[str, str]:
    """Return the versions of Python and of the libraries that can change an artifact's numbers.

    Args:
        also: further packages, which are left out where they are not installed.
    """
    found = {"python": platform.python_version()}
    found.update((name, version) for name in (*_RECORDED, *also) if (version := _version_of(name)))
    return found


@functools.cache
def _version_of(name: str) -> str | None:
    """Return the version of an installed library; reading its metadata takes milliseconds."""
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_same(what: str, expected: str, got: str, remedy: str) -> None:
    """Refuse artifacts that do not belong together.

    Raises:
        ArtifactMismatch: naming both digests.
    """
    if expected != got:
        raise ArtifactMismatch(
            f"{what} do not belong together: made for {expected[:16]}, given {got[:16]}. {remedy}"
        )


def require_fields(value: Mapping[str, Any], fields: Iterable[str], what: str) -> None:
    """Raise ArtifactError naming the fields an artifact lacks."""
    missing = [name for name in fields if name not in value]
    if missing:
        raise ArtifactError(f"{what} lacks {missing}; it may be of another version, make it anew")


def _prefix(path: Path) -> str:
    """Start of the temporary names of an artifact: who writes it, and on which machine."""
    return f".{path.name}.{platform.node()}.{os.getpid()}."


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of an artifact whose writer, of this machine, was killed."""
    start = f".{path.name}.{platform.node()}."
    for entry in path.parent.iterdir():
        writer = entry.name.removeprefix(start).partition(".")[0]
        if entry.name.startswith(start) and writer.isdigit() and not _is_running(int(writer)):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync_folder(path: Path) -> None:
    """Let a folder's names survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

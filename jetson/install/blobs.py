"""Fetch files into a store: hashed while they are written, resumed where they were cut.

A file that changed a little comes as a patch of the one that is here: a zstd frame whose raw
dictionary is the old file (`zstd --patch-from`).
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from jetson.install.release import RefusedRelease, ReleaseFile
from jetson.install.release_source import NoSuchFile, ReleaseSource
from jetson.install.store import TEMPORARY, Store
from jetson.install.trust import TARGETS, Catalogue, VouchedFile
from qvla_export.shared.artifacts import sha256_file, sync_folder

# zstd looks back at most 2 GiB, and old file and window are both in memory.
MOST_PATCHED_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Fetched:
    """How a file came to be in the store."""

    sha256: str
    # Bytes that came for it.
    nbytes: int
    # Digest of the file that it was patched from; None where it was fetched whole.
    patched_from: str | None = None


def blob_name(sha256: str) -> str:
    """Return a file's name among the repository's targets."""
    return f"blobs/{sha256}"


def delta_name(old: str, new: str) -> str:
    """Return the name, among the targets, of the patch that makes one file of another."""
    return f"deltas/{old}-{new}.zst"


def blob_target(catalogue: Catalogue, file: ReleaseFile) -> VouchedFile:
    """Return the target that holds a file of a release.

    Raises:
        RefusedRelease: there is none, or it is not this file.
    """
    target = catalogue.targets.get(blob_name(file.sha256))
    if target is None:
        raise RefusedRelease(
            "missing file", f"the repository does not vouch for {file.name}; publish it again"
        )
    if (target.sha256, target.nbytes) != (file.sha256, file.nbytes):
        raise RefusedRelease(
            "mixed", f"release and repository differ about {file.name}; publish it again"
        )
    return target


def fetch_blob(
    store: Store, source: ReleaseSource, catalogue: Catalogue, file: ReleaseFile
) -> Fetched:
    """Bring a file that is absent into the store, by a patch where there is one for what is here.

    Raises:
        RefusedRelease: what came is "altered", "truncated", "endless", or a "missing file".
        RemoteError: the source was cut; the same call goes on where it was.
        OSError: the disk is full or broken.
    """
    target = blob_target(catalogue, file)
    patch = find_patch(store, catalogue, file)
    if patch is not None:
        # Whatever is wrong with a patch, the whole file is there too.
        with suppress(RefusedRelease, NoSuchFile, zstandard.ZstdError):
            return _fetch_patched(store, source, file, *patch)
    return Fetched(file.sha256, _fetch_whole(store, source, target, file))


def has_blob(store: Store, file: ReleaseFile) -> bool:
    """Return whether a file is in the store, whole; a damaged one is removed."""
    path = store.blob(file.sha256)
    if not path.is_file():
        return False
    if path.stat().st_size == file.nbytes and sha256_file(path) == file.sha256:
        return True
    path.unlink()
    return False


def find_patch(
    store: Store, catalogue: Catalogue, file: ReleaseFile
) -> tuple[str, VouchedFile] | None:
    """Return the digest of a file that is here and the patch that makes a wanted one of it."""
    prefix, suffix = "deltas/", f"-{file.sha256}.zst"
    for name, target in catalogue.targets.items():
        if name.startswith(prefix) and name.endswith(suffix) and target.nbytes < file.nbytes:
            old = store.blob(name[len(prefix) : -len(suffix)])
            if old.is_file() and max(old.stat().st_size, file.nbytes) <= MOST_PATCHED_BYTES:
                return old.name, target
    return None


def stream_checked(source: ReleaseSource, target: VouchedFile) -> Iterator[bytes]:
    """Yield a target's bytes; whoever has read them all has read what the keys vouch for.

    Raises:
        RefusedRelease: "endless" as soon as it is, "truncated" or "altered" at the end.
    """
    digest, nbytes = hashlib.sha256(), 0
    for chunk in _missing_named(source, target.name, 0):
        nbytes += len(chunk)
        _require_short(target.name, nbytes, target.nbytes)
        digest.update(chunk)
        yield chunk
    _require_whole(target.name, nbytes, target.nbytes)
    if digest.hexdigest() != target.sha256:
        raise _altered(target.name, digest.hexdigest(), target.sha256)


def read_target(source: ReleaseSource, target: VouchedFile) -> bytes:
    """Return a small target's bytes; see `stream_checked`."""
    return b"".join(stream_checked(source, target))


def _fetch_whole(
    store: Store, source: ReleaseSource, target: VouchedFile, file: ReleaseFile
) -> int:
    """Download a file into the store; return the bytes that came."""
    temporary, nbytes = _download(store, source, target, file.name)
    _accept(store, temporary, file)
    return nbytes


def _download(
    store: Store, source: ReleaseSource, target: VouchedFile, what: str
) -> tuple[Path, int]:
    """Download a target from where an earlier download was cut.

    Returns:
        Where it lies, whole and synced; the bytes that came.
    """
    temporary = store.blobs / f"{TEMPORARY}{target.sha256}"
    start = temporary.stat().st_size if temporary.exists() else 0
    if start > target.nbytes:
        start = 0
    for offset in (start, 0) if start else (0,):
        with temporary.open("r+b" if offset else "w+b") as out:
            digest = hashlib.sha256()
            for chunk in iter(lambda: out.read(_CHUNK_BYTES), b""):
                digest.update(chunk)
            nbytes = offset
            if offset < target.nbytes:
                for chunk in _missing_named(source, target.name, offset):
                    nbytes += len(chunk)
                    _require_short_or_drop(temporary, target.name, nbytes, target.nbytes)
                    digest.update(chunk)
                    out.write(chunk)
            _sync(out)
        if digest.hexdigest() == target.sha256:
            return temporary, nbytes - offset
    temporary.unlink()
    _require_whole(what, nbytes, target.nbytes)
    raise _altered(what, digest.hexdigest(), target.sha256)


def _fetch_patched(
    store: Store, source: ReleaseSource, file: ReleaseFile, old: str, patch: VouchedFile
) -> Fetched:
    frame, came = _download(store, source, patch, patch.name)
    temporary = store.blobs / f"{TEMPORARY}patched-{file.sha256}"
    digest, nbytes = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as out, frame.open("rb") as patches:
            for chunk in unpatched(store.blob(old), patches):
                nbytes += len(chunk)
                _require_short(file.name, nbytes, file.nbytes)
                digest.update(chunk)
                out.write(chunk)
            _sync(out)
        if digest.hexdigest() != file.sha256:
            raise _altered(patch.name, digest.hexdigest(), file.sha256)
        # Before the file has its name: nobody would come back for the patch.
        frame.unlink()
        _accept(store, temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
        frame.unlink(missing_ok=True)
    return Fetched(file.sha256, came, old)


def unpatched(old: Path, frame: bytes | IO[bytes]) -> Iterator[bytes]:
    """Yield what a patch, as bytes or as an open file, makes of a file.

    Raises:
        ZstdError: it is not a patch of this file.
    """
    dictionary = zstandard.ZstdCompressionDict(
        old.read_bytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT
    )
    opener = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << 31)
    with opener.stream_reader(frame) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _accept(store: Store, temporary: Path, file: ReleaseFile) -> None:
    temporary.chmod(0o444)
    temporary.replace(store.blob(file.sha256))
    sync_folder(store.blobs)


def _sync(out: IO[Any]) -> None:
    out.flush()
    os.fsync(out.fileno())


def _missing_named(source: ReleaseSource, name: str, offset: int) -> Iterable[bytes]:
    try:
        yield from source.stream(f"{TARGETS}/{name}", offset)
    except NoSuchFile as error:
        raise RefusedRelease("missing file", f"the repository lacks {name}: {error}") from None


def _require_short(name: str, nbytes: int, most: int) -> None:
    if nbytes > most:
        raise RefusedRelease(
            "endless", f"{name} has {most} bytes and more came; do not use this repository"
        )


def _require_short_or_drop(temporary: Path, name: str, nbytes: int, most: int) -> None:
    try:
        _require_short(name, nbytes, most)
    except RefusedRelease:
        temporary.unlink()
        raise


def _require_whole(name: str, nbytes: int, expected: int) -> None:
    if nbytes < expected:
        raise RefusedRelease(
            "truncated", f"{name} has {expected} bytes, {nbytes} are there; publish it again"
        )


def _altered(name: str, found: str, expected: str) -> RefusedRelease:
    return RefusedRelease(
        "altered", f"{name}: expected SHA-256 {expected}, found {found}; do not use this repository"
    )

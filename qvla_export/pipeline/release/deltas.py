"""Patches between releases: what a changed plan costs a robot that has the one before."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from jetson.install.blobs import MOST_PATCHED_BYTES, delta_name
from jetson.install.release import BUNDLE, Release, ReleaseFile
from qvla_export.pipeline.release.repository import Repository
from qvla_export.shared.artifacts import write_bytes

# A smaller file is sent whole; a patch that saves less than a tenth is not worth keeping.
_LEAST_BYTES, _MOST_SHARE = 16_384, 0.9
_LEVEL = 19


@dataclass(frozen=True)
class Delta:
    """A patch that was made."""

    file: str
    # Its name among the targets.
    name: str
    nbytes: int
    whole_bytes: int


def patched_frame(old: bytes, new: bytes, level: int = _LEVEL) -> bytes:
    """Return the zstd frame that makes one file of another, as `zstd --patch-from` does."""
    # The window must reach back over all of the old file.
    window_log = max(20, min(31, (len(old) + len(new)).bit_length()))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=len(new), window_log=window_log, enable_ldm=True
    )
    dictionary = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    compressor = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters)
    return compressor.compress(new)


def make_deltas(
    folder: Path, release: Release, repository: Repository, before: Release
) -> list[Delta]:
    """Write patches of the files that differ between two releases into the new one's folder."""
    return [
        delta
        for old, new in changed_files(before, release)
        if (delta := _make(folder, repository, old, new)) is not None
    ]


def changed_files(before: Release, after: Release) -> Iterator[tuple[ReleaseFile, ReleaseFile]]:
    """Yield the files of one name whose contents differ."""
    known = {file.name: file for file in before.files}
    digests = {file.sha256 for file in before.files}
    for file in after.files:
        if file.name in known and file.sha256 not in digests:
            yield known[file.name], file


def _make(folder: Path, repository: Repository, old: ReleaseFile, new: ReleaseFile) -> Delta | None:
    blob = repository.targets / "blobs" / old.sha256
    if new.nbytes < _LEAST_BYTES or max(old.nbytes, new.nbytes) > MOST_PATCHED_BYTES:
        return None
    if not blob.is_file():
        return None
    frame = patched_frame(blob.read_bytes(), (folder / BUNDLE / new.name).read_bytes())
    if len(frame) > _MOST_SHARE * new.nbytes:
        return None
    name = delta_name(old.sha256, new.sha256)
    write_bytes(folder / name, frame)
    return Delta(new.name, name, len(frame), new.nbytes)

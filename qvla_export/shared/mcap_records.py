"""Records of an MCAP file, whole or damaged; nothing in it is believed before it was checked.

A long recording of ours has several files: `run.mcap` goes on in `run_0002.mcap`, `run_0003.mcap`
and so on. Each is complete and can be read alone; what they say of themselves tells those of one
recording from others that have such names.
"""

import dataclasses
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import lz4.frame
import zstandard
from mcap.exceptions import McapError
from mcap.records import Chunk, McapRecord, Metadata
from mcap.stream_reader import StreamReader, breakup_chunk

from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.git_lfs import refuse_pointer
from qvla_export.shared.recorded_messages import ABOUT, FORMAT

_LOG = logging.getLogger(__name__)
# In what a file says of itself: which recording it belongs to, and its place there from 1.
IDENTITY = "recording"
NUMBER = "file"
_MOST_DIGITS = 6
# Of a record, and of what a chunk unpacks to.
_MOST_BYTES = 256 << 20
# What the mcap library and the decompressors raise over damaged bytes; lz4 a bare RuntimeError.
_DAMAGE = (
    McapError,
    ValueError,
    OverflowError,
    struct.error,
    zstandard.ZstdError,
    EOFError,
    RuntimeError,
)


def read_records(path: Path, start: int = 0) -> Iterator[tuple[int, McapRecord]]:
    """Yield records up to the end, or to where the file is damaged, which is logged.

    Args:
        path: the file.
        start: where to begin: 0, or the offset of a record.

    Yields:
        Where the record begins in the file, of a chunk's records where the chunk does; and the
        record. Chunks are unpacked, whichever compression MCAP knows they have.

    Raises:
        ArtifactError: the file cannot be opened, or is a pointer of Git LFS.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ArtifactError(f"the recording {path} cannot be read: {error}") from None
    with file:
        refuse_pointer(path)
        file.seek(start)
        # A length inside a record may lie as one outside may, which the library bounds.
        bounded = cast(IO[bytes], _BoundedReads(file))
        reader = StreamReader(
            bounded, skip_magic=start > 0, emit_chunks=True, record_size_limit=_MOST_BYTES
        )
        records = iter(reader.records)
        while True:
            # Of the first record the magic bytes precede.
            offset = file.tell()
            try:
                record = next(records, None)
                inside = unpack_chunk(record) if isinstance(record, Chunk) else [record]
            except _DAMAGE as error:
                reason = f"{type(error).__name__} {error}".strip()
                _LOG.warning("%s ends early (%s); what precedes is read", path, reason)
                return
            for one in inside:
                if one is None:
                    return
                yield offset, one


class _BoundedReads:
    """A file whose `read` refuses what would be allocated before it is known to be there."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, length: int) -> bytes:
        """Return at most so many bytes."""
        if length > _MOST_BYTES:
            raise ValueError(f"a field of {length} bytes, at most {_MOST_BYTES} are read")
        return self._file.read(length)


def unpack_chunk(chunk: Chunk) -> list[McapRecord]:
    """Return the records of a chunk, decompressed as a stream: a frame need not state its size.

    Raises:
        ValueError: it unpacks to another size than it announces, or to too many bytes.
    """
    most = chunk.uncompressed_size
    if most > _MOST_BYTES:
        raise ValueError(f"a chunk of {most} bytes, at most {_MOST_BYTES} are read")
    if chunk.compression == "zstd":
        stream = zstandard.ZstdDecompressor().stream_reader(chunk.data, read_across_frames=True)
        data = stream.read(most + 1)
    elif chunk.compression == "lz4":
        data = _of_lz4_frames(chunk.data, most + 1)
    elif chunk.compression == "":
        data = chunk.data
    else:
        raise ValueError(f"compression {chunk.compression!r}, MCAP has zstd and lz4")
    if len(data) != most:
        raise ValueError(f"a chunk of {len(data)} bytes or more where {most} are announced")
    plain = dataclasses.replace(chunk, compression="", data=data)
    return breakup_chunk(plain, validate_crc=True)


def numbered_file(first: Path, number: int) -> Path:
    """Return the name of a recording's file, by its place from 1."""
    return first if number == 1 else first.with_name(f"{first.stem}_{number:04d}{first.suffix}")


def read_about(path: Path) -> dict[str, str] | None:
    """Return what a file says of itself; None where it is no recording of ours.

    Raises:
        ArtifactError: it cannot be read.
    """
    about = next((r for _, r in read_records(path) if isinstance(r, Metadata)), None)
    if about is None or about.name != ABOUT or about.metadata.get("format") != FORMAT:
        return None
    return dict(about.metadata)


def recording_files(path: Path) -> Iterator[Path]:
    """Yield a file of a recording and those that continue it, in order, as far as they are there.

    Raises:
        ArtifactError: one of them cannot be read.
    """
    yield path
    about = read_about(path) or {}
    identity, told = about.get(IDENTITY), about.get(NUMBER, "")
    if not identity or not told.isdecimal() or len(told) > _MOST_DIGITS:
        return
    number = int(told)
    first = path
    if number != 1:
        base = path.stem.removesuffix(f"_{number:04d}")
        first = path.with_name(base + path.suffix)
        if not base or numbered_file(first, number) != path:
            return  # It was given another name.
    while (following := numbered_file(first, number + 1)).is_file():
        number += 1
        about = read_about(following) or {}
        if (about.get(IDENTITY), about.get(NUMBER)) != (identity, str(number)):
            return
        yield following


def _of_lz4_frames(data: bytes, most: int) -> bytes:
    """Return what frames one after another unpack to, at most so many bytes."""
    unpacked = b""
    while data and len(unpacked) < most:
        frame = lz4.frame.LZ4FrameDecompressor()
        unpacked += frame.decompress(data, max_length=most - len(unpacked))
        data = frame.unused_data or b"" if frame.eof else b""
    return unpacked

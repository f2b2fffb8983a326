"""Records of an MCAP file, whole or damaged; nothing in it is believed before it was checked."""

import dataclasses
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import lz4.frame
import zstandard
from mcap.exceptions import McapError
from mcap.records import Chunk, McapRecord
from mcap.stream_reader import StreamReader, breakup_chunk

from qvla_export.shared.errors import ArtifactError

_LOG = logging.getLogger(__name__)
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
        ArtifactError: the file cannot be opened.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ArtifactError(f"the recording {path} cannot be read: {error}") from None
    with file:
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
        data = lz4.frame.LZ4FrameDecompressor().decompress(chunk.data, max_length=most + 1)
    elif chunk.compression == "":
        data = chunk.data
    else:
        raise ValueError(f"compression {chunk.compression!r}, MCAP has zstd and lz4")
    if len(data) != most:
        raise ValueError(f"a chunk of {len(data)} bytes or more where {most} are announced")
    plain = dataclasses.replace(chunk, compression="", data=data)
    return breakup_chunk(plain, validate_crc=True)

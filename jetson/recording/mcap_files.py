"""The noun `McapFiles`: what a recorder writes to, one file after the other.

A file's index stays in memory until the file ends, 0.8 kB for every chunk; so a file ends after
some chunks, complete as any other, and the next one goes on where it ended.
"""

import errno
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mcap.writer import Writer

from jetson.errors import RefusedSetting
from jetson.recording.new_files import create_recording
from jetson.recording.schemas import SCHEMAS
from qvla_export.shared.mcap_records import IDENTITY, NUMBER, numbered_file
from qvla_export.shared.recorded_messages import ABOUT, END

_CHUNK_BYTES = 1 << 20
# Of a file: 17 minutes at one a second, or 1 GiB before compression.
_FILE_CHUNKS = 1024
# The process's or the machine's descriptors are used up, which passes.
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


class McapFiles:
    """Messages of JSON in MCAP files of bounded size. For one thread."""

    def __init__(self, first: Path, about: Mapping[str, str]) -> None:
        """Create the first file and say in it what is recorded.

        Args:
            first: to write; neither it nor the one that would continue it may exist.
            about: what every file says of itself, beside its place among them.

        Raises:
            RefusedSetting: a file exists or cannot be made.
        """
        self._first = first
        self._number = 1
        self._about = {**about, IDENTITY: secrets.token_hex(8)}
        self._channels: dict[str, int] = {}
        # Of this file; and bytes of messages since the last of them.
        self._chunks = 0
        self._pending_bytes = 0
        file = create_recording(first, numbered_file(first, 2))
        try:
            self._begin(file)
        except OSError as error:
            raise RefusedSetting(f"cannot record to {first}: {error}") from None

    def write(self, topic: str, kind: str, log_ns: int, value: Mapping[str, Any]) -> None:
        """Append a message.

        Args:
            topic: the channel's.
            kind: key of its schema in `SCHEMAS`.
            log_ns: nanoseconds since 1970.
            value: finite JSON.

        Raises:
            OSError: the disk refuses it.
        """
        channel = self._channels.get(topic)
        if channel is None:
            name, schema = SCHEMAS[kind]
            schema_id = self._mcap.register_schema(name, "jsonschema", schema)
            channel = self._mcap.register_channel(topic, "json", schema_id)
            self._channels[topic] = channel
        data = json.dumps(value, allow_nan=False).encode()
        self._mcap.add_message(channel, log_ns, data, publish_time=log_ns)
        self._pending_bytes += len(data)

    def flush(self, counts: Mapping[str, str]) -> None:
        """Complete a chunk of what was written, and the file where it has as many as one may.

        Args:
            counts: what a file that ends says of the recording so far.

        Raises:
            OSError: the disk refuses it, or the next file.
        """
        if self._pending_bytes:
            self._chunks += 1 + self._pending_bytes // _CHUNK_BYTES
            self._pending_bytes = 0
        self._mcap.flush()  # type: ignore[no-untyped-call]  # of mcap
        if self._chunks >= _FILE_CHUNKS:
            self._continue(counts)

    def end(self, how: str, counts: Mapping[str, str]) -> None:
        """Complete the file with a record of how it ended.

        Raises:
            OSError: the disk refuses it.
        """
        self._mcap.add_metadata(END, {**counts, "ended": how})
        self._mcap.finish()  # type: ignore[no-untyped-call]  # of mcap

    def close(self) -> None:
        """Let the file go, as it is."""
        # Closing flushes, and fails again where the disk is full.
        with suppress(OSError):
            self._file.close()

    def _continue(self, counts: Mapping[str, str]) -> None:
        following = numbered_file(self._first, self._number + 1)
        try:
            file = following.open("xb")
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:
                return  # The next chunk comes to the same place.
            raise
        try:
            self.end(f"continues in {following.name}", counts)
        except BaseException:
            _discard(file)
            raise
        self.close()
        self._number += 1
        self._begin(file)

    def _begin(self, file: IO[bytes]) -> None:
        self._file = file
        self._mcap = Writer(file, chunk_size=_CHUNK_BYTES)
        self._channels = {}
        self._chunks = 0
        self._pending_bytes = 0
        try:
            self._mcap.start(library="qvla")
            self._mcap.add_metadata(ABOUT, {**self._about, NUMBER: str(self._number)})
            file.flush()
        except BaseException:
            _discard(file)
            raise


def _discard(file: IO[bytes]) -> None:
    """Remove a file that nothing was written to."""
    with suppress(OSError):
        file.close()
    with suppress(OSError):
        Path(file.name).unlink()

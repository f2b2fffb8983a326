"""Records of a TFRecord file: length, checksum, bytes, checksum; nothing is believed unchecked.

Source: tensorflow/core/lib/io/record_writer.h.
"""

import mmap
from pathlib import Path

from calibration.sources.rlds.crc32c import masked_crc32c
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.git_lfs import refuse_pointer

_LENGTH_BYTES = 8
_CHECKSUM_BYTES = 4
_HEAD_BYTES = _LENGTH_BYTES + _CHECKSUM_BYTES


class TfRecordFile:
    """A file of records, mapped into memory: only what is looked at is read.

    Raises:
        ArtifactError: it is missing, empty, truncated or no TFRecord file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read as TFRecord: {error}") from None
        self._view = memoryview(self._map)
        try:
            # Start and length of each record's bytes.
            self._places = self._find_records()
        except ArtifactError:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._places)

    def record(self, number: int) -> memoryview:
        """Return a record's bytes, unchecked."""
        start, length = self._places[number]
        return self._view[start : start + length]

    def check(self, number: int) -> None:
        """Compare a record's bytes with its checksum.

        Raises:
            ArtifactError: they differ.
        """
        start, length = self._places[number]
        checksum = self._view[start + length : start + length + _CHECKSUM_BYTES]
        if int.from_bytes(checksum, "little") != masked_crc32c(self.record(number)):
            raise ArtifactError(
                f"{self.path}, record {number}: the checksum is wrong, the file is damaged; copy "
                "it again"
            )

    def close(self) -> None:
        """Let go of the file, once nothing is read from it any more."""
        self._view.release()
        try:
            self._map.close()
        except BufferError:
            # A record is still in someone's hands; the map goes with it.
            return

    def _find_records(self) -> list[tuple[int, int]]:
        places: list[tuple[int, int]] = []
        at, size = 0, len(self._view)
        while at < size:
            head = bytes(self._view[at : at + _HEAD_BYTES])
            length = int.from_bytes(head[:_LENGTH_BYTES], "little")
            stop = at + _HEAD_BYTES + length + _CHECKSUM_BYTES
            checksum = int.from_bytes(head[_LENGTH_BYTES:], "little")
            if len(head) < _HEAD_BYTES or checksum != masked_crc32c(head[:_LENGTH_BYTES]):
                refuse_pointer(self.path)
                raise ArtifactError(
                    f"{self.path}, byte {at}: no TFRecord begins here; the file is damaged, "
                    "compressed or of another format; copy it again"
                )
            if stop > size:
                raise ArtifactError(
                    f"{self.path} is truncated: record {len(places)} ends at byte {stop:,}, the "
                    f"file at {size:,}; copy it again"
                )
            places.append((at + _HEAD_BYTES, length))
            at = stop
        return places

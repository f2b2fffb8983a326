"""The noun `NativeFile`: a program or library of a wheel, and what it asks of a system.

Read as the loader reads it (System V ABI, chapter 5; LSB 5.0, 10.7): through the program headers to
the table of needed versions. Section headers may have been stripped.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from qvla_export.shared.errors import QvlaError

MAGIC = b"\x7fELF"
_MACHINES = {3: "x86", 40: "arm", 62: "x86-64", 183: "aarch64", 243: "riscv"}
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_STRTAB, _DT_VERNEED, _DT_VERNEEDNUM = 5, 0x6FFFFFFE, 0x6FFFFFFF
# "GLIBC_2.38"; GLIBC_PRIVATE is of no version.
_VERSION = re.compile(r"(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)*)")
# No table is longer: more is damage.
_MOST_ENTRIES = 4096


class DamagedFile(QvlaError):
    """A native file cannot be read as one."""


@dataclass(frozen=True)
class NativeFile:
    """What one native file is for and needs."""

    # "aarch64".
    architecture: str
    # Library -> newest version of its symbols that is needed; none for what needs none.
    needs: dict[str, tuple[int, ...]]


def read_native_file(data: bytes) -> NativeFile:
    """Read a native file.

    Raises:
        DamagedFile: it is cut off, or its tables lead nowhere.
    """
    try:
        return _read(data)
    except (struct.error, LookupError, StopIteration, OverflowError):
        raise DamagedFile("it begins as a native file and is damaged") from None


def _read(data: bytes) -> NativeFile:
    if len(data) < 20:
        raise DamagedFile("it begins as a native file and is cut off")
    order = "<" if data[5] == 1 else ">"
    machine = struct.unpack_from(f"{order}H", data, 18)[0]
    wide, little = data[4] == 2, order == "<"
    architecture = _MACHINES.get(machine, f"machine {machine}")
    if architecture != "aarch64" or not wide or not little:
        bits = "" if wide else ", 32 bits"
        return NativeFile(f"{architecture}{bits}{'' if little else ', big-endian'}", {})
    loads, dynamic = _segments(data)
    if dynamic is None:
        return NativeFile(architecture, {})
    entries = dict(_dynamic_entries(data, *dynamic))
    needs: dict[str, tuple[int, ...]] = {}
    if _DT_VERNEED in entries:
        names = _offset(loads, entries[_DT_STRTAB])
        table = _offset(loads, entries[_DT_VERNEED])
        for name in _needed_versions(data, table, names, entries.get(_DT_VERNEEDNUM, 0)):
            if (version := _VERSION.fullmatch(name)) is not None:
                numbers = tuple(int(part) for part in version[2].split("."))
                needs[version[1]] = max(needs.get(version[1], ()), numbers)
    return NativeFile(architecture, needs)


def _segments(data: bytes) -> tuple[list[tuple[int, int, int]], tuple[int, int] | None]:
    """Return loaded segments as (address, size, offset), and where the dynamic table lies."""
    (start,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    loads, dynamic = [], None
    for i in range(count):
        kind, _, offset, address, _, nbytes = struct.unpack_from("<IIQQQQ", data, start + i * size)
        if kind in (_PT_LOAD, _PT_DYNAMIC) and offset + nbytes > len(data):
            raise DamagedFile("it begins as a native file and is cut off")
        if kind == _PT_LOAD:
            loads.append((address, nbytes, offset))
        elif kind == _PT_DYNAMIC:
            dynamic = (offset, nbytes)
    return loads, dynamic


def _dynamic_entries(data: bytes, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
    for at in range(offset, offset + nbytes - 15, 16):
        tag, value = struct.unpack_from("<QQ", data, at)
        if tag == 0:
            return
        yield tag, value


def _offset(loads: list[tuple[int, int, int]], address: int) -> int:
    """Return where in the file lies what is loaded to an address."""
    return next(o + address - start for start, size, o in loads if start <= address < start + size)


def _needed_versions(data: bytes, table: int, names: int, count: int) -> Iterator[str]:
    left = _MOST_ENTRIES
    for _ in range(count):
        _, versions, _, first, following = struct.unpack_from("<HHIII", data, table)
        at = table + first
        left -= versions + 1
        if left < 0:
            raise DamagedFile("it begins as a native file and is damaged")
        for _ in range(versions):
            _, _, _, name, later = struct.unpack_from("<IHHII", data, at)
            yield _text(data, names + name)
            at += later
        table += following


def _text(data: bytes, at: int) -> str:
    end = data.find(b"\0", at, at + 256)
    if end < 0:
        raise DamagedFile("it begins as a native file and is damaged")
    return data[at:end].decode("ascii", "replace")

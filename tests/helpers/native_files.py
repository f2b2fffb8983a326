"""Native files of a few hundred bytes, and wheels that hold them."""

import io
import struct
import tarfile
import zipfile
from pathlib import Path

AARCH64, X86_64, ARM = 183, 62, 40
_HEADER, _PROGRAM = 64, 56


def native_file(*versions: str, machine: int = AARCH64, wide: bool = True) -> bytes:
    """Return a shared library that needs versions of symbols: "GLIBC_2.28"."""
    names, places = b"\0libc.so.6\0", []
    for version in versions:
        places.append(len(names))
        names += version.encode() + b"\0"
    strings = _HEADER + 2 * _PROGRAM
    table = strings + len(names)
    needed = struct.pack("<HHIII", 1, len(versions), 1, 16, 0)
    for i, place in enumerate(places):
        following = 16 if i + 1 < len(places) else 0
        needed += struct.pack("<IHHII", 0, 0, i + 2, place, following)
    entries = [(5, strings), (0x6FFFFFFE, table), (0x6FFFFFFF, 1)] if versions else []
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in [*entries, (0, 0)])
    start = table + len(needed)
    size = start + len(dynamic)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, _HEADER, 0, 0,
                                 _HEADER, _PROGRAM, 2, 0, 0, 0)  # fmt: skip
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, size, size, 4096)
    linked = struct.pack("<IIQQQQQQ", 2, 6, start, start, 0, len(dynamic), len(dynamic), 8)
    return header + load + linked + names + needed + dynamic


def made_wheel(folder: Path, files: dict[str, bytes], name: str = "thing-1.0-py3-none-any") -> Path:
    """Write a wheel of files."""
    path = folder / f"{name}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, data in files.items():
            archive.writestr(file, data)
    return path


def made_python(folder: Path, files: dict[str, bytes]) -> Path:
    """Write a tar archive of files."""
    path = folder / "python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path

"""Small files of /proc and /sys, read so that nothing fails."""

import re
from collections.abc import Iterator
from pathlib import Path


def text_of(path: Path) -> str:
    """Return a file's text without padding; empty if it cannot be read.

    Sensors that are switched off and files of root's alone fail with all kinds of OSError.
    """
    try:
        return path.read_text(errors="replace").strip("\0 \n\t")
    except (OSError, ValueError):
        return ""


def number_of(text: str | Path) -> float | None:
    """Return the finite number that a text, or a file's text, is; None if it is none."""
    try:
        value = float(text_of(text) if isinstance(text, Path) else text)
    except ValueError:
        return None
    return value if value == value and abs(value) != float("inf") else None


def meminfo_bytes(text: str, name: str) -> int | None:
    """Return the bytes that the text of /proc/meminfo states; None if it does not."""
    match = re.search(rf"^{name}:\s*(\d{{1,15}}) kB", text, re.M)
    return int(match[1]) * 1024 if match else None


def paths_in(folder: Path, pattern: str) -> list[Path]:
    """Return the paths below a folder that match, numbers in order; none if there is no folder."""
    try:
        return sorted(folder.glob(pattern), key=_natural)
    except (OSError, ValueError):
        return []


def numbers_of(folder: Path, *names: str) -> Iterator[float | None]:
    """Yield the number in each file of a folder."""
    return (number_of(folder / name) for name in names)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(path))
    ]

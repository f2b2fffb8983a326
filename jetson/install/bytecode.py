"""Python's compiled files beside everything that a server imports: `python -m` this, as root.

The account that serves may not write beside the code. What neither pip nor a runtime's file brings
compiled, it would compile again at every start: longer than all the rest of a start takes.
"""

import compileall
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def compile_code(folders: "list[Path] | None" = None) -> int:
    """Compile what is not compiled yet, also behind links; return how many files were looked at.

    Folders that cannot be written, and files that are no Python, are left as they are.

    Args:
        folders: of packages; None for those of the Python that runs.
    """
    looked = 0
    for folder in folders or code_folders():
        for path in _sources(folder):
            compileall.compile_file(path, quiet=2)
            looked += 1
    return looked


def code_folders() -> list[Path]:
    """Return the folders of installed packages, and ours where they lie elsewhere."""
    installed = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    ours = Path(__file__).resolve().parents[2]
    rooms = ("engines", "jetson", "qvla_export")
    return list(dict.fromkeys([*installed, *(ours / room for room in rooms)]))


def _sources(folder: Path) -> Iterator[Path]:
    """Yield the Python files below a folder whose compiled ones can be written."""
    entered = set()
    for place, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:  # a link that leads back
            below.clear()
            continue
        entered.add(real)
        if os.access(place, os.W_OK):
            yield from (Path(place, name) for name in sorted(names) if name.endswith(".py"))


if __name__ == "__main__":
    compile_code()

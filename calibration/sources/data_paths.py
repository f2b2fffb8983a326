"""Paths that a data set names: they stay inside it, whoever wrote them."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from qvla_export.shared.errors import ArtifactError

# The Hub's cache: <repository>/snapshots/<revision>/..., whose files are links into its blobs.
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


def visible(paths: Iterable[Path]) -> list[Path]:
    """Return paths in order without hidden ones, as macOS leaves beside files it copies."""
    return sorted(path for path in paths if not path.name.startswith("."))


def path_inside(root: Path, name: str, place: str) -> Path:
    """Return the file that a data set names.

    Args:
        root: folder of the data set.
        name: path from there, as it is written.
        place: where it is written, for messages.

    Raises:
        ArtifactError: it leads out of the folder, or is a link that does; links of the Hub's cache
            lead to its own blobs.
    """
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or ".." in parts:
        raise _outside(name, place)
    path = root / name
    try:
        real, whole = path.resolve(), root.resolve()
    except (OSError, RuntimeError):  # links in a circle; before Python 3.13 a RuntimeError
        raise _outside(name, place) from None
    homes = [whole]
    homes += [p.parent / _BLOBS for p in (whole, *whole.parents) if p.name == _SNAPSHOTS]
    if not any(real.is_relative_to(home) for home in homes):
        raise _outside(name, place)
    if "\\" in name and not path.exists():
        raise ArtifactError(
            f"{place}: {name!r:.120} is written as Windows writes paths; write / between folders"
        )
    return path


def _outside(name: str, place: str) -> ArtifactError:
    return ArtifactError(
        f"{place}: a data set's files lie in its folder, {name!r:.120} does not; write paths from "
        "there, and copy what lies elsewhere"
    )

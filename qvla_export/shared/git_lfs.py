"""Pointers that Git LFS leaves in a clone where it has not fetched a file."""

from pathlib import Path

from qvla_export.shared.errors import ArtifactError

_START = b"version https://git-lfs"


def refuse_pointer(path: Path, content: bytes | None = None) -> None:
    """Refuse a file that is a pointer to what it should be.

    Args:
        path: the file.
        content: of it, or its beginning; None reads that. What cannot be read is no pointer.

    Raises:
        ArtifactError: it is a pointer; with the command that fetches the file.
    """
    if content is None:
        try:
            with path.open("rb") as file:
                content = file.read(len(_START))
        except OSError:
            return
    if content.startswith(_START):
        raise ArtifactError(
            f"{path} is not the file but a pointer of Git LFS to it; fetch it where it was cloned: "
            "git lfs pull"
        )

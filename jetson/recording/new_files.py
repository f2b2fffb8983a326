"""Files that a recorder begins: recordings are never overwritten."""

import errno
from pathlib import Path
from typing import IO

from jetson.errors import RefusedSetting


def create_recording(path: Path, following: Path | None = None) -> IO[bytes]:
    """Create a recording's file, and the folder it is in.

    Args:
        path: to write.
        following: what would continue it; must not exist either.

    Raises:
        RefusedSetting: a file exists or cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if following is not None and following.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(following))
        return path.open("xb")
    except OSError as error:
        # A file in place of the folder exists too.
        if isinstance(error, FileExistsError) and error.filename != str(path.parent):
            raise RefusedSetting(
                f"{error.filename} exists; recordings are not overwritten, choose another name"
            ) from None
        raise RefusedSetting(f"cannot record to {path}: {error}") from None

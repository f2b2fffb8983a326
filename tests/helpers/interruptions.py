"""Operations that end before their n-th change of the disk: killed, with a torn file, or full."""

import errno
import logging
import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

How = Literal["kill", "torn", "full"]
HOWS: tuple[How, ...] = ("kill", "torn", "full")
# All through which the code changes what is on the disk; contents reach it with fsync.
_OPERATIONS = ("fsync", "replace", "rename", "unlink", "rmdir", "link", "symlink", "mkdir", "chmod")


class Interruption:
    """Counts changes of the disk; the n-th does not happen, and nothing after it."""

    def __init__(self, moment: int | None, how: How) -> None:
        self.count = 0
        self._moment, self._how = moment, how
        self._fsync = os.fsync
        for name in _OPERATIONS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self._moment is not None and self.count >= self._moment:
                self._end(name, arguments)
            return operation(*arguments, **named)

        return counted

    def _end(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self._how == "full" and name in ("unlink", "rmdir"):
            return  # a full disk lets things be removed
        if self._how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._how == "torn" and name == "fsync":
            # What was written and not yet synced is there in part, or as zeros.
            handle = arguments[0]
            size = os.fstat(handle).st_size
            if Path(f"/proc/self/fd/{handle}").is_file():
                kept = random.Random(self._moment).randrange(size + 1)
                os.ftruncate(handle, kept)
                os.ftruncate(handle, kept + (size - kept) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def interrupted(act: Callable[[], object], moment: int | None, how: How) -> tuple[int, int]:
    """Do something in a child of this process; return its exit status and its changes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            logging.disable()
            interruption = Interruption(moment, how)
            try:
                act()
                code = 0
            finally:
                os.write(writer, str(interruption.count).encode())
        except BaseException:
            code = code or 1
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        count = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(count or 0)


def copy_store(source: Path, target: Path) -> None:
    """Copy a store, files that are links of each other as such."""
    target.parent.mkdir(exist_ok=True)
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)

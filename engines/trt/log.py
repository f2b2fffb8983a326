"""What TensorRT and the driver below it say while they work, kept for error messages."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engines.trt.modules import TrtModule

_KEPT = 200
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")


class Log:
    """Warnings and errors, oldest first, and the builder's account of its weights."""

    def __init__(self, module: TrtModule) -> None:
        """Make the `logger` that the module's classes take."""
        self.messages: list[str] = []
        # Bytes of the last engine's weights, as the builder counts them; None before it does.
        self.weights_bytes: int | None = None
        self.logger: Any = _logger_class(module.api)(self)

    def add(self, message: str, serious: bool) -> None:
        """Keep a message if it is serious."""
        if serious:
            self.messages = [*self.messages[1 - _KEPT :], message]
        elif found := _WEIGHTS.search(message):
            self.weights_bytes = int(found[1])

    @contextmanager
    def native_errors(self) -> Iterator[None]:
        """Keep what native code prints to standard error: the driver does not use the logger."""
        sys.stderr.flush()
        saved = os.dup(2)
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(saved, 2)
                os.close(saved)
                file.seek(0)
                for line in file.read().decode(errors="replace").splitlines():
                    if line.strip():
                        # Reasons come before what TensorRT makes of them.
                        self.messages.insert(0, line.strip())


def _logger_class(api: Any) -> Any:
    class Logger(api.ILogger):  # type: ignore[misc]  # the module is known at run time only
        def __init__(self, log: Log) -> None:
            api.ILogger.__init__(self)
            self._log = log

        def log(self, severity: Any, message: str) -> None:
            """Take a message; called by native code."""
            self._log.add(message, severity <= api.ILogger.WARNING)

    return Logger

"""A warning that may come many times a second, and fills no log."""

import logging
import time

_PERIOD_S = 60.0


class RepeatedWarning:
    """Logs the first of many like warnings, then one a minute with the count of the others."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._next_s = 0.0
        self._unsaid = 0

    def warn(self, message: str) -> None:
        """Log a warning, or count it."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more like it)" if self._unsaid else ""
        self._log.warning("%s%s", message, more)
        self._next_s, self._unsaid = now_s + _PERIOD_S, 0

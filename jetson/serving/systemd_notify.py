"""Tell systemd that a server is ready, and that it still is: sd_notify(3), without its library."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator


def notify(words: str) -> bool:
    """Send a line to the service manager, "READY=1"; return whether there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    # An abstract address begins with a zero byte.
    place = f"\0{address[1:]}" if address[0] == "@" else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(words.encode(), place)
        return True
    return False


def watchdog_s() -> float | None:
    """Return how often the manager wants a sign of life; None if it does not."""
    period, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not period.isdigit() or (process and process != str(os.getpid())):
        return None
    return int(period) / 1e6


@contextlib.contextmanager
def signs_of_life(is_able: Callable[[], bool]) -> Iterator[None]:
    """Send WATCHDOG=1 for the duration of a block, while the server is able to act.

    A server whose inference does not end sends none: the manager ends it.
    """
    period_s = watchdog_s()
    if period_s is None:
        yield
        return
    ending = threading.Event()

    def send() -> None:
        while not ending.wait(period_s / 3):
            if is_able():
                notify("WATCHDOG=1")

    thread = threading.Thread(target=send, name="qvla-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()

"""A control loop on the attacked server, as robots run it, and a driver that is stopped at times.

`qvla run URL --source stdin --commands stdout` is a process of its own; observations are written to
it, and a driver in another process reads its commands.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jetson.serving.wire import encode_request
from qvla_export.pipeline.soak.driver import MAX_AGE_MS, CommandCounts
from qvla_export.pipeline.soak.numbered_policy import CONTRACT, observation_of
from qvla_export.pipeline.soak.server_process import Address

_RATE_HZ = 20.0
_ROBOT = 40
_END_S = 120.0
# One line in so many is no observation.
_WRONG_LINE = 0.02
_LONGEST_PAUSE_S = 1.5


class ControlRun:
    """A running loop with its camera and its driver."""

    def __init__(self, address: Address, seed: int, errors: Path) -> None:
        self._rng = random.Random(seed)
        self._errors = errors
        self._over = threading.Event()
        with errors.open("wb") as said:
            self.loop = subprocess.Popen(
                _loop_command(address), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
            )
        module = "qvla_export.pipeline.soak.driver"
        self.driver = subprocess.Popen(
            [sys.executable, "-m", module], stdin=self.loop.stdout, stdout=subprocess.PIPE
        )
        assert self.loop.stdin is not None and self.loop.stdout is not None
        # The driver alone reads it: a pipe that somebody else holds open does not break.
        self.loop.stdout.close()
        self._camera = threading.Thread(
            target=self._feed, args=(self.loop.stdin,), name="soak-camera"
        )
        self._camera.start()

    def pause_one(self) -> None:
        """Stop the driver or the loop for a while."""
        process = self._rng.choice((self.driver, self.loop))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(self._rng.uniform(0.1, _LONGEST_PAUSE_S))
            os.kill(process.pid, signal.SIGCONT)

    def end(self) -> tuple[CommandCounts, list[str]]:
        """End the camera's stream, so that everything ends; return counts and what went wrong."""
        faults = []
        if (code := self.loop.poll()) is not None:
            faults.append(f"the control loop ended early, exit {code}")
        self._over.set()
        self._camera.join(_END_S)
        for what, process in (("control loop", self.loop), ("driver", self.driver)):
            try:
                code = process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                faults.append(f"the {what} did not end with its input")
            else:
                # 2 says that faults were counted, which the soak makes.
                if code not in ((0, 2) if process is self.loop else (0,)):
                    faults.append(f"the {what} ended with {code}")
        said = self._errors.read_text(errors="replace")
        if faults or "Traceback" in said or "run: stopped" not in said:
            faults.append(f"the control loop said: {said[-600:]}")
        assert self.driver.stdout is not None
        try:
            counts = CommandCounts(**json.load(self.driver.stdout))
        except ValueError:
            return CommandCounts(), [*faults, "the driver gave no account of its commands"]
        return counts, faults

    def kill(self) -> None:
        """Leave nothing running."""
        self._over.set()
        for process in (self.loop, self.driver):
            if process.poll() is None:
                process.kill()
                process.wait()
        self._camera.join(_END_S)
        for stream in (self.loop.stdin, self.driver.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _feed(self, stream: IO[bytes]) -> None:
        """Write observations at a camera's rate, and now and then a line that is none."""
        frame = 0
        with contextlib.suppress(OSError, ValueError), stream:
            while not self._over.wait(1.0 / _RATE_HZ):
                frame += 1
                body = encode_request(observation_of(_ROBOT, frame), CONTRACT)
                if self._rng.random() < _WRONG_LINE:
                    body = self._rng.choice((b"{", b"[]", b"null", body[: len(body) // 2]))
                stream.write(body + b"\n")
                stream.flush()


@contextlib.contextmanager
def control_run(address: Address, seed: int, folder: Path) -> Iterator[ControlRun]:
    """Yield a control loop that acts by the server's policy; kills it where it is left running."""
    run = ControlRun(address, seed, folder / "control")
    try:
        yield run
    finally:
        run.kill()


def _loop_command(address: Address) -> list[str]:
    return [
        *(sys.executable, "-m", "qvla_export", "run", address.http.url("http")),
        *("--source", "stdin", "--commands", "stdout", "--rate-hz", f"{_RATE_HZ:g}"),
        *("--hold", "last", "--limits=-1:1", "--max-action-age-ms", f"{MAX_AGE_MS:g}"),
        # The engine fails for as long as the soak wants it to.
        *("--give-up-s", "1e9", "--ramp-ms", "200"),
    ]

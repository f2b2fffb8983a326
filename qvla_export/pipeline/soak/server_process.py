"""A real server in a process of its own, which can be stopped, starved of disk and looked at."""

import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetson.clients.endpoint import Endpoint
from jetson.serving.security import TlsFiles
from qvla_export.pipeline.soak.numbered_policy import NumberedPolicy
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.mcap_records import recording_files

_START_S = 120.0
# A server drains for 10 s; a busy machine gets more.
_END_S = 120.0
# Beyond what the recording has when the disk fills.
_LEFT_BYTES = 1 << 16
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    port: int
    gr00t_port: int
    encrypted: bool = False

    @property
    def http(self) -> Endpoint:
        """HTTP and websockets."""
        return Endpoint(_LOOPBACK, self.port, self.encrypted)

    @property
    def gr00t(self) -> Endpoint:
        """ZMQ, which is never encrypted."""
        return Endpoint(_LOOPBACK, self.gr00t_port)

    def connect(self, timeout_s: float = 20.0) -> socket.socket:
        """Return a connection to the HTTP port, encrypted where the server is.

        Raises:
            OSError: nobody accepts it.
        """
        stream = socket.create_connection((_LOOPBACK, self.port), timeout_s)
        if not self.encrypted:
            return stream
        # Attackers do not look whom they attack.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(stream)


@dataclass(frozen=True)
class ServerProcess:
    """A running server."""

    address: Address
    process: Any
    # Whether its engine is to fail; shared memory.
    failing: Any
    recording: Path
    # What it said on stderr: nothing, unless a thread died.
    errors: Path

    @property
    def pid(self) -> int:
        """Its process."""
        return int(self.process.pid)

    def resident_bytes(self) -> int:
        """Return the memory that the process holds."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        """Return how many files, sockets and pipes it has open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def fill_disk(self) -> None:
        """Let the kernel refuse what it writes from now on, as it does on a full disk."""
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        *_, newest = recording_files(self.recording)
        most = newest.stat().st_size + _LEFT_BYTES
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (most, hard))

    def pause(self, seconds: float) -> None:
        """Stop the process for a while."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(self.pid, signal.SIGCONT)

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return bool(self.process.is_alive())

    def end(self) -> list[str]:
        """Ask it to end; return what went wrong."""
        faults = [] if self.is_alive else [f"the server ended early, exit {self.process.exitcode}"]
        self.process.terminate()
        self.process.join(_END_S)
        if self.process.exitcode is None:
            self.process.kill()
            faults.append("the server did not end when asked to")
        elif not faults and self.process.exitcode != 0:
            faults.append(f"the server ended with {self.process.exitcode}")
        if said := self.errors.read_text(errors="replace").strip():
            faults.append(f"the server said on stderr: {said[-600:]}")
        return faults


@contextlib.contextmanager
def server_process(folder: Path, seed: int, tls: TlsFiles | None) -> Iterator[ServerProcess]:
    """Yield a server that answers in every protocol; kills it where it is left running.

    Args:
        folder: takes its recording and its stderr.
        seed: of its engine's faults.
        tls: certificate and key; None serves without encryption.

    Raises:
        QvlaError: it does not start.
    """
    context = multiprocessing.get_context("spawn")
    failing = context.Value("b", 0)
    address = Address(_free_port(), _free_port(), tls is not None)
    recording, errors = folder / "soak.mcap", folder / "stderr"
    process = context.Process(
        target=_run, args=(address, failing, recording, errors, tls, seed), daemon=True
    )
    process.start()
    try:
        _await_port(process, address, errors)
        yield ServerProcess(address, process, failing, recording, errors)
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _run(
    address: Address, failing: Any, recording: Path, errors: Path, tls: TlsFiles | None, seed: int
) -> None:
    from jetson.server import serve
    from jetson.server_settings import ServerSettings
    from qvla_export.shared.allocator import bound_freed_memory

    # As `qvla serve` does.
    bound_freed_memory()
    # Refusals are counted by those who are refused; what is left is what nobody handles.
    logging.disable(logging.CRITICAL)
    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)
    settings = ServerSettings(
        port=address.port,
        gr00t_port=address.gr00t_port,
        tls=tls,
        # Attackers and good clients share the one address that loopback is.
        max_rate_hz=0.0,
        record=recording,
    )
    serve(NumberedPolicy(failing, seed), settings)


def _await_port(process: Any, address: Address, errors: Path) -> None:
    end_s = time.monotonic() + _START_S
    while time.monotonic() < end_s and process.is_alive():
        with contextlib.suppress(OSError), address.connect():
            return
        time.sleep(0.05)
    said = errors.read_text(errors="replace")[-600:] if errors.exists() else ""
    raise QvlaError(f"the server did not start within {_START_S:g} s; it said: {said}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])

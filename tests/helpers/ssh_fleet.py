"""Robots behind real sshd on loopback, each with a host key, a port and a store of its own."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from places import HELPERS, ROOT
from ports import free_port
from small_releases import Host

from jetson.install.store import Store

# Unpacked from Debian's package without being installed: `make test`.
_UNPACKED = ROOT / ".venv" / "sshd"
_PROGRAM = HELPERS / "robot_program.py"


def sshd_words() -> tuple[list[str], dict[str, str]]:
    """Return how sshd is started here, and with which environment; skip the test without one."""
    unpacked = Path(os.environ.get("QVLA_SSHD", _UNPACKED))
    if (unpacked / "usr" / "sbin" / "sshd").is_file():
        if (unpacked / "usr" / "lib" / "openssh" / "sshd-session").is_file():
            pytest.skip("this sshd finds its parts only where it is installed: openssh-server")
        libraries = [str(path) for path in sorted(unpacked.glob("**/*-linux-gnu"))]
        return [str(unpacked / "usr/sbin/sshd")], {"LD_LIBRARY_PATH": ":".join(libraries)}
    path = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if path is None or shutil.which("ssh") is None:
        pytest.skip("no sshd or no ssh here: make test unpacks openssh-server where it can")
    return [path], {}


def _as_root(folder: Path) -> list[str]:
    """Return what gives root's sshd the account and the folder that its package makes.

    In a mount namespace of its own: nothing changes on this machine.
    """
    text = Path("/etc/passwd").read_text()
    if os.geteuid() != 0 or ("\nsshd:" in text and Path("/run/sshd").is_dir()):
        return []
    accounts = folder / "passwd"
    if "\nsshd:" not in text:
        text += "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
    accounts.write_text(text)
    script = 'mount --bind "$1" /etc/passwd && mount -t tmpfs none /run && mkdir /run/sshd'
    return [
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'{script} && shift && exec "$@"',
        "sh",
        str(accounts),
    ]


@dataclass
class SshRobot:
    """A robot and its server."""

    name: str
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    def start(self) -> None:
        words, environment = sshd_words()
        words = [*_as_root(self.folder), *words, "-D", "-e"]
        with (self.folder / "sshd.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*words, "-f", str(self.folder / "sshd_config")],
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
            )
        _await_port(self.port, self.process, self.folder / "sshd.log")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
            self.process = None


@dataclass
class SshFleet:
    """Robots in a row, the file that names them, and what is released to them."""

    root: Path
    host: Host
    robots: list[SshRobot]
    # What the file says of all robots beside how they are reached.
    defaults: str = 'healthy = "checked"\n'
    # Of robots that are reached through a relay.
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.root / "robots.toml"

    def write(self, **settings: str) -> Path:
        """Write robots.toml; `settings` are further lines by robot."""
        lines = [
            f'repository = "{self.host.repository.root}"',
            'known_hosts = "known_hosts"',
            "[defaults]",
            f'host = "127.0.0.1"\nkey = "client"\ntarget = "cpu"\nroot = "{self.host.anchor}"',
            f'command = "{sys.executable} {_PROGRAM}"',
            self.defaults,
        ]
        for robot in self.robots:
            port = self.ports.get(robot.name, robot.port)
            lines += [f"[robots.{robot.name}]", f"port = {port}"]
            lines += [f'store = "{robot.store.root}"', settings.get(robot.name, "")]
        self.file.write_text("\n".join(lines))
        self._know({robot.name: self.ports.get(robot.name, robot.port) for robot in self.robots})
        return self.file

    def _know(self, ports: dict[str, int]) -> None:
        known = [
            f"[127.0.0.1]:{ports[robot.name]} {(robot.folder / 'host_key.pub').read_text()}"
            for robot in self.robots
        ]
        (self.root / "known_hosts").write_text("".join(known))


@contextlib.contextmanager
def ssh_fleet(root: Path, host: Host, count: int) -> Iterator[SshFleet]:
    """Start so many robots; they and their servers end with the block."""
    sshd_words()
    root.mkdir(parents=True, exist_ok=True)
    _new_key(root / "client")
    robots = [_new_robot(root, f"arm-{i + 1:02d}") for i in range(count)]
    try:
        for robot in robots:
            robot.start()
        yield SshFleet(root, host, robots)
    finally:
        for robot in robots:
            robot.stop()


def _new_robot(root: Path, name: str) -> SshRobot:
    folder = root / name
    folder.mkdir()
    _new_key(folder / "host_key")
    port = free_port()
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host_key'}\n"
        f"AuthorizedKeysFile {root / 'client.pub'}\nPidFile none\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        f"AllowUsers {pwd.getpwuid(os.geteuid()).pw_name}\nAllowTcpForwarding no\n"
        f"SetEnv PYTHONPATH={ROOT} OMP_NUM_THREADS=1\n"
    )
    return SshRobot(name, folder, port)


def _new_key(path: Path) -> None:
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)


def _await_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + 30
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None or time.monotonic() > end_s:
            said = log.read_text(errors="replace")
            if "locked" in said or process.poll() is not None:
                pytest.skip(f"sshd does not run here: {said[-300:]}")
            raise AssertionError(said)
        time.sleep(0.05)


class Relay:
    """A way to a robot that breaks: each connection after so many bytes towards it."""

    def __init__(self, port: int, cut_after: list[int]) -> None:
        self.cut_after = cut_after
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        # Wakes the thread, which a plain close does not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(20)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._port))
            most = self.cut_after.pop(0) if self.cut_after else None
            self.connections += 1
            for ends in ((near, far, most), (far, near, None)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket, most: int | None) -> None:
        carried = 0
        with contextlib.suppress(OSError):
            while chunk := source.recv(16_384):
                carried += len(chunk)
                if most is not None and carried > most:
                    break
                sink.sendall(chunk)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

"""A robot whose systemd really boots, in a container without network: systemd-nspawn(1).

The system's tree stays as it is (`tests/helpers/systemd_roots.py`); what a robot keeps over a
restart, its store and its units, lies in folders of the host that are bound into it. Python and its
packages are this machine's own.
"""

import json
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from places import ROOT

from jetson.install.bytecode import compile_code
from jetson.install.units import SERVE, UnitSettings, write_units

PORT = 8000
_UNITS = "/etc/systemd/system"
# Where what stands for a flashed robot's runtime unpacks itself.
UNPACKED = "/opt/unpacked"
_TOOLS = {"nvpmodel": "/usr/sbin/nvpmodel", "jetson_clocks": "/usr/bin/jetson_clocks"}
# Asks a server, all the time, what it serves: a line for every time it asked.
_PROBE = """
import http.client, json, sys, time
def ask(path):
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=0.5)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()
while True:
    at = time.monotonic()
    ready = ask("/readyz")[0] == 200
    status, body = ask("/metadata") if ready else (0, b"")
    digest = json.loads(body)["bundle_digest"] if status == 200 else ""
    print(at, digest, flush=True)
    time.sleep(0.02)
"""


@dataclass
class Seen:
    """What a client of the server saw, from the first moment on: (s, bundle digest or "")."""

    answers: list[tuple[float, str]] = field(default_factory=list)

    def serves(self, digest: str, since_s: float) -> float | None:
        """Return when a bundle answered first after a moment; None if it has not."""
        return next((at for at, one in self.answers if at > since_s and one == digest), None)

    def longest_silence_s(self, since_s: float) -> float:
        """Return the longest time without an answer, from the last one before a moment on."""
        times = [at for at, one in self.answers if one]
        gaps = [b - a for a, b in pairwise(times) if b > since_s]
        return max(gaps, default=0.0)


class BootedRobot:
    """A container with systemd in it, and the commands that run there."""

    # What commands are started with there.
    python = "/opt/qvla/bin/python"

    def __init__(self, root: Path, folder: Path, repository: Path, anchor: Path) -> None:
        """Prepare a robot's folders.

        Args:
            root: system that boots.
            folder: of what this robot keeps.
            repository: of releases, there as /opt/repository.
            anchor: of its keys, there as /opt/1.root.json.
        """
        self.root, self.folder, self.repository, self.anchor = root, folder, repository, anchor
        self.store, self.units = folder / "store", folder / "units"
        self.log, self.tools, self.etc = folder / "log", folder / "tools", folder / "etc"
        self._container: subprocess.Popen[bytes] | None = None
        for path in (self.store, self.units, self.log, self.tools, self.etc):
            path.mkdir(parents=True)
        self.settings = UnitSettings(Path(self.python), power_mode=0, serve_options=(
            "--warmup", "0", "--threads", "1"))  # fmt: skip
        write_units(self.units, self.settings)
        # The checkout is read-only there: what a robot compiles once is compiled here.
        compile_code([ROOT / room for room in ("engines", "jetson", "qvla_export")])
        self._make_tools()

    def _make_tools(self) -> None:
        for name in _TOOLS:
            tool = self.tools / name
            tool.write_text(f'#!/bin/sh\necho {name} "$@" >> /var/log/board/calls\n')
            tool.chmod(0o755)
        home = self.folder / "venv"
        packages = home / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        for path in (home / "bin", packages):
            path.mkdir(parents=True)
        (home / "bin" / "python").symlink_to(f"/opt/python/bin/{Path(sys.executable).name}")
        (home / "pyvenv.cfg").write_text("home = /opt/python/bin\n")
        (packages / "qvla.pth").write_text("/opt/checkout\n/opt/packages\n")

    def boot(self) -> None:
        """Start it; returns once systemd answers."""
        read_only = {
            Path(sys.base_prefix): "/opt/python", ROOT: "/opt/checkout",
            Path(sysconfig.get_paths()["purelib"]): "/opt/packages",
            **{self.tools / name: place for name, place in _TOOLS.items()},
        }  # fmt: skip
        library = sysconfig.get_config_var("INSTSONAME")
        if str(library).startswith("libpython") and ".so" in str(library):
            shared = Path(sysconfig.get_config_var("LIBDIR")) / library
            read_only[shared] = f"/usr/lib/{library}"
        words = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network"]
        words += ["--boot", f"--directory={self.root}", f"--bind={self.log}:/var/log/board"]
        words += [f"--bind-ro={source}:{place}" for source, place in read_only.items()]
        words += self._own_words()
        with (self.folder / "console").open("ab") as console:
            self._container = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )  # fmt: skip
        self.until(lambda: self.call("systemctl", "show", "--property=Version").returncode == 0)

    def _own_words(self) -> list[str]:
        """Return how its system is mounted, and what of a robot is in it."""
        return [
            # Accounts and keys outlive a restart.
            "--volatile=overlay", f"--overlay={self.root / 'etc'}:{self.etc}:/etc",
            f"--bind={self.store}:/var/lib/qvla", f"--bind={self.units}:{_UNITS}",
            f"--bind-ro={self.folder / 'venv'}:/opt/qvla",
            f"--bind-ro={self.repository}:/opt/repository",
            f"--bind-ro={self.anchor}:/opt/1.root.json",
        ]  # fmt: skip

    @property
    def leader(self) -> int:
        """Return the process of the container's systemd, as this machine knows it."""
        assert self._container is not None and self._container.poll() is None, self.console
        for line in Path(f"/proc/{self._container.pid}/task").glob("*/children"):
            for child in line.read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
        return 0

    @property
    def console(self) -> str:
        """Return what the container said last."""
        return (self.folder / "console").read_text(errors="replace")[-2000:]

    def call(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in the container as root."""
        inside = ["nsenter", "--target", str(self.leader), "--all", "--root", "--wd=/"]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        return subprocess.run(
            [*inside, *words], capture_output=True, text=True, check=False, env=environment
        )

    def qvla(self, *words: str) -> dict[str, Any]:
        """Run `qvla robot` in the container; return what it said."""
        done = self.call(self.python, "-m", "qvla_export", "robot", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def systemctl(self, *words: str) -> str:
        """Run systemctl in the container; return what it said."""
        done = self.call("systemctl", *words)
        assert done.returncode == 0, f"{words}: {done.stderr}{self.journal()}"
        return done.stdout.strip()

    def journal(self, *words: str) -> str:
        """Return what the units said last."""
        return self.call("journalctl", "--no-pager", "--lines=60", *words).stdout

    def server(self) -> int:
        """Return the server's process, as the container knows it."""
        return int(self.systemctl("show", "--property=MainPID", "--value", SERVE))

    @contextmanager
    def watched(self) -> Iterator[Seen]:
        """Ask the server what it serves for the duration of a block."""
        inside = ["nsenter", "--target", str(self.leader), "--net", sys.executable, "-S", "-c"]
        probe = subprocess.Popen([*inside, _PROBE, str(PORT)], stdout=subprocess.PIPE, text=True)
        seen = Seen()

        def read() -> None:
            assert probe.stdout is not None
            with probe.stdout as lines:
                for line in lines:
                    at, _, digest = line.rstrip("\n").partition(" ")
                    seen.answers.append((float(at), digest))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield seen
        finally:
            probe.kill()
            probe.wait()
            reader.join()

    def until(self, condition: Callable[[], object], seconds: float = 120.0) -> None:
        """Wait for something; say what the units said where it does not come."""
        end_s = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end_s:
                said = self.journal() if self.leader else ""
                raise AssertionError(f"it did not come to that\n{said}\n{self.console}")
            time.sleep(0.05)

    def restart(self) -> None:
        """Restart the machine, as far as a container is one; returns once systemd answers."""
        assert self._container is not None
        self.call("systemctl", "reboot", "--no-block")
        # systemd-nspawn ends, and leaves it to whoever started it to do so again.
        self._container.wait(120)
        self.boot()

    def end(self) -> None:
        """Switch it off."""
        if self._container is not None:
            # systemd-nspawn passes this on as a request to power off.
            self._container.terminate()
            try:
                self._container.wait(60)
            except subprocess.TimeoutExpired:
                self._container.kill()
                self._container.wait()


class FlashedRobot(BootedRobot):
    """One whose root file system `qvla flash prepare` has laid its overlay on."""

    python = "/opt/qvla/venv/bin/python"

    def __init__(self, rootfs: Path, folder: Path) -> None:
        """Take a prepared root file system, and a folder for what stands for its board."""
        super().__init__(rootfs, folder, folder, folder)
        self.store = rootfs / "var/lib/qvla"

    def _own_words(self) -> list[str]:
        return [f"--bind-ro={self.folder / 'venv'}:{UNPACKED}"]


def lacking(words: Sequence[str] = ("systemd-nspawn", "nsenter")) -> str | None:
    """Return why no robot can be booted here; None if one can."""
    from shutil import which

    if os.geteuid() != 0:
        return "needs root, for systemd-nspawn"
    absent = [word for word in words if which(word) is None]
    return f"needs {' and '.join(absent)}: Debian's package systemd-container" if absent else None

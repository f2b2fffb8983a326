"""A robot in namespaces of its own: aarch64 by emulation, no network but its own loopback.

Started as `unshare --user --map-root-user --mount --net --pid --fork python emulated_robot.py JOB`:
it prepares the system, lets the runtime install, check, activate and serve a release in it, and
asks that server for actions over HTTP, as a client outside the emulation; or lets the runtime build
a bundle's engines.
"""

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from jetson.clients.http_client import RemotePolicy
from jetson.errors import RemoteError
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.observation import Observation

_MS_BIND, _MS_REC = 4096, 16384
_PORT = 8777
# What an aarch64 program begins with, and which of those bytes count (binfmt_misc).
_MAGIC = rb"\x7fELF\x02\x01\x01" + rb"\x00" * 9 + rb"\x02\x00\xb7\x00"
_MASK = rb"\xff" * 7 + rb"\x00" + rb"\xff" * 8 + rb"\xfe" + rb"\xff" * 3
_START_S = 900.0


def observations(contract: PolicyContract, count: int) -> list[Observation]:
    """Return observations that depend on nothing but the contract."""
    rng = np.random.default_rng(15)
    blank = contract.blank_observation()
    return [
        Observation(
            {
                name: rng.integers(0, 256, image.shape, np.uint8)
                for name, image in blank.images.items()
            },
            f"push block {i}",
            rng.uniform(-1, 1, blank.state.shape).astype(np.float32),
        )
        for i in range(count)
    ]


def build(root: Path, runtime: list[str]) -> Any:
    """Build the engines of /opt/bundle; return what the command said."""
    done = _inside(root, [*runtime, "build", "/opt/bundle", "--json"])
    output, _ = done.communicate()
    if done.returncode != 0:
        raise SystemExit(f"qvla build ended with {done.returncode}")
    return json.loads(output)


def serve(root: Path, runtime: list[str]) -> dict[str, Any]:
    """Carry a release from its repository to actions; return what each command said."""
    commands = {
        "install": ("--from", "/opt/repository", "--target", "cpu", "--root", "/opt/1.root.json"),
        "verify": ("--samples", "20"),
        "activate": (),
        "status": (),
    }
    said: dict[str, Any] = {}
    for name, options in commands.items():
        done = _inside(root, [*runtime, "robot", name, *options])
        output, _ = done.communicate()
        said[name] = json.loads(output or b"null")
        if done.returncode != 0:
            raise SystemExit(f"qvla robot {name}: {said[name]}")
    server = _inside(
        root, [*runtime, "serve", "/var/lib/qvla/current/bundle", "--port", str(_PORT)]
    )
    try:
        with _connected(server) as remote:
            seen = observations(remote.contract, 3)
            said["actions"] = [remote.infer(one).actions.tolist() for one in seen]
            said["bundle_digest"] = remote.contract.bundle_digest
    finally:
        server.terminate()
        said["serve"] = server.wait(120)
    return said


def _prepare(root: Path, emulator: Path) -> None:
    """Mount what a system has, let the kernel start aarch64 programs, raise the loopback."""
    for name in ("proc", "sys", "dev"):
        (root / name).mkdir(exist_ok=True)
    _mount("proc", root / "proc", "proc", 0)
    for name in ("sys", "dev"):
        _mount(f"/{name}", root / name, "none", _MS_BIND | _MS_REC)
    binfmt = root / "proc/sys/fs/binfmt_misc"
    # A kernel of 6.7 or newer keeps these per user namespace: nothing else on the machine sees it.
    _mount("binfmt_misc", binfmt, "binfmt_misc", 0)
    rule = b":qvla:M::" + _MAGIC + b":" + _MASK + b":" + os.fsencode(emulator) + b":F"
    (binfmt / "register").write_bytes(rule)
    with socket.socket() as handle:
        # SIOCSIFFLAGS: IFF_UP.
        fcntl.ioctl(handle, 0x8914, struct.pack("16sh", b"lo", 1))


def _mount(source: str, target: Path, kind: str, flags: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    words = [source.encode(), os.fsencode(target), kind.encode()]
    if library.mount(*words, flags, None) != 0:
        number = ctypes.get_errno()
        raise SystemExit(f"cannot mount {kind} on {target}: {os.strerror(number)}")


def _inside(root: Path, words: list[str]) -> "subprocess.Popen[bytes]":
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8",
        # An Orin's cores.
        "QEMU_CPU": "cortex-a78ae",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen(
        ["/usr/sbin/chroot", str(root), *words], stdout=subprocess.PIPE, env=environment
    )


def _connected(server: "subprocess.Popen[bytes]") -> RemotePolicy:
    end_s = time.monotonic() + _START_S
    while True:
        try:
            return RemotePolicy(f"http://127.0.0.1:{_PORT}", 300.0)
        except RemoteError:
            if server.poll() is not None or time.monotonic() > end_s:
                raise
        time.sleep(1.0)


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    system = Path(job["root"])
    _prepare(system, Path(job["emulator"]))
    do = {"build": build, "serve": serve}[job["what"]]
    print(json.dumps(do(system, [f"/usr/bin/{job['python']}", "/opt/qvla.pex"])))

"""Systems for aarch64 and an emulator of an Orin's cores, for tests that execute a robot's runtime.

    python tests/helpers/arm64_roots.py FOLDER

fetches them from the mirror that this machine's apt uses, some 100 MB, and TensorRT for RTX, whose
builder needs no GPU, from pip's index, 90 MB; nothing is installed, and none of the packages'
scripts run. Then: QVLA_ARM64=FOLDER make test-slow
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

# Suite of Debian -> minor of its Python 3. No suite has 3.10 or 3.12.
SUITES = {"bookworm": 11, "trixie": 13}
# The oldest emulator that runs ONNX Runtime on a cortex-a78ae is 11; only sid has it.
_EMULATOR_SUITE, _EMULATOR = "sid", "qemu-user"
# Folder of TensorRT for RTX, and the suite whose Python it is for.
TENSORRT, TENSORRT_SUITE = "tensorrt-rtx", "trixie"
_TENSORRT_VERSION = "1.7.1.116"
_PACKAGES = ("python3", "libstdc++6", "libgcc-s1", "libc-bin", "coreutils", "bash", "base-files")


def fetch(folder: Path) -> None:
    """Fetch the emulator and a system of every suite."""
    folder.mkdir(parents=True, exist_ok=True)
    unpacked = folder / "emulator"
    _unpack(folder, _EMULATOR_SUITE, "amd64", (_EMULATOR,), unpacked)
    shutil.copy2(unpacked / "usr/bin/qemu-aarch64", folder / "qemu-aarch64")
    shutil.rmtree(unpacked)
    for suite in SUITES:
        _unpack(folder, suite, "arm64", _PACKAGES, folder / suite)
    fetch_tensorrt(folder)


def fetch_tensorrt(folder: Path) -> None:
    """Fetch TensorRT for RTX, as the system's package of Python that JetPack's TensorRT is."""
    packages, wheels = folder / TENSORRT, folder / "wheels"
    names = [f"tensorrt-rtx-cu13-{name}=={_TENSORRT_VERSION}" for name in ("libs", "bindings")]
    minor = SUITES[TENSORRT_SUITE]
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    words += ["--only-binary", ":all:", "--platform", "manylinux_2_35_aarch64"]
    words += ["--implementation", "cp", "--python-version", f"3.{minor}"]
    subprocess.run([*words, "--abi", f"cp3{minor}", "--abi", "none", *names], check=True)
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    shutil.rmtree(wheels)
    # What their meta-package installs, which has no wheel.
    name = "tensorrt_rtx"
    (packages / name).mkdir()
    imports = f"from {name}_bindings import *\nfrom {name}_bindings import __version__\n"
    (packages / name / "__init__.py").write_text(imports)


def _unpack(
    folder: Path, suite: str, architecture: str, packages: tuple[str, ...], root: Path
) -> None:
    """Download packages with what they depend on and unpack them into a folder."""
    state = folder / f"apt-{suite}"
    for name in ("etc/apt.conf.d", "etc/preferences.d", "state/lists/partial", "cache/archives"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    (state / "etc/sources.list").write_text(f"deb {mirror()} {suite} main\n")
    settings = {
        "Dir": state, "Dir::Etc": "etc", "Dir::Etc::sourcelist": "sources.list",
        "Dir::Etc::sourceparts": "-", "Dir::Etc::trustedparts": "/etc/apt/trusted.gpg.d",
        "Dir::State": "state", "Dir::State::status": state / "status", "Dir::Cache": "cache",
        "APT::Architecture": architecture, "APT::Install-Recommends": "false",
        "Acquire::Languages": "none", "Acquire::Check-Valid-Until": "false",
        "Debug::NoLocking": "true",
    }  # fmt: skip
    config = state / "apt.conf"
    lines = [f'{name} "{value}";\n' for name, value in settings.items()]
    config.write_text("".join(lines) + f'APT::Architectures {{"{architecture}";}};\n')
    environment = {**os.environ, "APT_CONFIG": str(config)}
    run = ("apt-get", "--quiet", "--assume-yes")
    subprocess.run([*run, "update"], check=True, env=environment)
    if packages == (_EMULATOR,):
        # Linked statically: what it depends on is not needed.
        archives = state / "cache/archives"
        subprocess.run([*run, "download", *packages], check=True, env=environment, cwd=archives)
    else:
        words = [*run, "--download-only", "install", *packages]
        subprocess.run(words, check=True, env=environment)
    root.mkdir(exist_ok=True)
    for archive in sorted((state / "cache/archives").glob("*.deb")):
        tar = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE)
        words = ["tar", "--extract", "--keep-directory-symlink", "--directory", str(root)]
        subprocess.run(words, stdin=tar.stdout, check=True)
    shutil.rmtree(state)


def mirror() -> str:
    """Return where this machine's apt gets its packages."""
    words = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    return found.stdout.splitlines()[0]


if __name__ == "__main__":
    fetch(Path(sys.argv[1]).absolute())

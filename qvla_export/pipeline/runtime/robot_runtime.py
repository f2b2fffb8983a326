"""The step that builds a robot's runtime: one file, for the Python that the robot has."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.targets import CPU
from engines.trt.modules import admits
from qvla_export.pipeline.progress import OnProgress, Progress, ignore
from qvla_export.pipeline.runtime.robots import ARCHITECTURE, RobotSystem
from qvla_export.pipeline.runtime.scan import (
    RefusedWheel,
    Scan,
    dotted,
    scan_python,
    scan_wheel,
    scan_zip,
)
from qvla_export.pipeline.runtime.tools import require_tools, run_tool
from qvla_export.pipeline.runtime.wheels import (
    CONSTRAINTS,
    build_own_wheel,
    fetch_wheels,
    read_lock,
    requirements,
    write_lock,
)
from qvla_export.shared.artifacts import sha256_file, sync_folder, write_bytes, write_json
from qvla_export.shared.errors import QvlaError

FORMAT = "qvla-runtime-1"
_SUFFIX = ".pex"
# What TensorRT's memory goes through.
_EXTRA = "device"
CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class OwnPython:
    """A Python that comes to the robot with its runtime: a tar archive, by its digest."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class RuntimeRequest:
    """What a runtime is built for, and of what."""

    system: RobotSystem
    # The runtime; its lock and description lie beside it as .lock and .json.
    output: Path
    # Checkout of QVLA.
    source: Path = CHECKOUT
    # An earlier lock; None makes one.
    lock: Path | None = None
    own_python: OwnPython | None = None


@dataclass(frozen=True)
class BuiltRuntime:
    """A runtime and what is in it; its `.json`."""

    format: str
    system: str
    # "3.10"
    python: str
    sha256: str
    nbytes: int
    lock_sha256: str
    # Digest of the archive of its own Python; None for the system's.
    own_python_sha256: str | None
    native_files: int
    # "GLIBC" -> newest version that is needed, "2.28".
    needs: dict[str, str]
    # Distribution -> version.
    packages: dict[str, str]
    # What it cannot do there, and what to do about it.
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return what people want to know of it."""
        needs = ", ".join(f"{library} {version}" for library, version in self.needs.items())
        return [
            f"runtime for {self.system}, Python {self.python}: {self.nbytes / 1e6:.1f} MB, "
            f"{len(self.packages)} packages, sha256 {self.sha256}",
            f"{self.native_files} native files, all {ARCHITECTURE}; newest needed: {needs}",
            *(f"note: {note}" for note in self.notes),
        ]


def build_runtime(request: RuntimeRequest, on_progress: OnProgress = ignore) -> BuiltRuntime:
    """Lock, fetch, scan and pack; nothing is compiled, on this machine or on the robot.

    Raises:
        MissingExtra: a program that it is made with is not installed.
        FailedTool: something has no wheels for the robot, or cannot be fetched.
        RefusedWheel: a file would not run there.
        QvlaError: the output is not named as such a file is.
    """
    if request.output.suffix != _SUFFIX:
        raise QvlaError(
            f"a runtime's name ends with {_SUFFIX}, got {request.output.name!r}: .lock and .json "
            "are those of the files beside it"
        )
    require_tools()
    system, scans = request.system, []
    if request.own_python is not None:
        on_progress(Progress("own Python"))
        scan, minor = _scan_own(request.own_python, system)
        system, scans = system.with_python(minor), [scan]
    request.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=request.output.parent, prefix=".runtime-") as place:
        work = Path(place)
        on_progress(Progress("wheel of this checkout"))
        own = build_own_wheel(request.source, work)
        lock = work / "lock.txt"
        if request.lock is None:
            on_progress(Progress("lock"))
            constraints = request.source / CONSTRAINTS
            named = constraints if constraints.is_file() else None
            write_lock(requirements(own, _EXTRA), named, system, lock)
        else:
            write_bytes(lock, request.lock.read_bytes())
        packages = read_lock(lock)
        on_progress(Progress(f"wheels of {len(packages)} packages"))
        wheels = (own, *fetch_wheels(lock, system, work / "wheels"))
        for wheel in wheels:
            scan_wheel(wheel, system)
        on_progress(Progress("one file of all"))
        packed = _pack(wheels, system, work)
        scans.append(scan_zip(packed, system))
        built = _describe(request, system, packages, lock, packed, Scan.sum(scans))
        _place(request.output, packed, lock, built)
    return built


def _scan_own(python: OwnPython, system: RobotSystem) -> tuple[Scan, int]:
    if not python.path.is_file():
        raise RefusedWheel(f"archive of a Python not found: {python.path}")
    if (digest := sha256_file(python.path)) != python.sha256.lower():
        raise RefusedWheel(
            f"{python.path} has SHA-256 {digest}, not {python.sha256}; fetch it again "
            "from whom you trust"
        )
    return scan_python(python.path, system)


def _pack(wheels: Sequence[Path], system: RobotSystem, work: Path) -> Path:
    """Return one file of wheels that unpacks itself where it is started first."""
    platform, packed = work / "platform.json", work / "runtime.pex"
    write_json(platform, system.to_pex())
    arguments = (
        *(word for wheel in wheels for word in ("--pre-resolved-dist", wheel)),
        # PEX packs what this asks for, and none of the other wheels.
        *(f"qvla[{_EXTRA}]", "--complete-platform", platform, "--no-build", "--venv", "prepend"),
        # TensorRT is the system's: JetPack brings it as a package of its Python.
        *("--venv-system-site-packages", "--console-script", "qvla"),
        *("--python-shebang", f"/usr/bin/env python{system.python}", "--output-file", packed),
        *("--pex-root", work / "pex", "--disable-cache"),
    )
    run_tool("pex", arguments, "the wheels cannot be packed")
    return packed


def _describe(
    request: RuntimeRequest,
    system: RobotSystem,
    packages: dict[str, str],
    lock: Path,
    packed: Path,
    scan: Scan,
) -> BuiltRuntime:
    own = request.own_python
    return BuiltRuntime(
        FORMAT,
        system.name,
        system.python,
        sha256_file(packed),
        packed.stat().st_size,
        hashlib.sha256(lock.read_bytes()).hexdigest(),
        None if own is None else own.sha256.lower(),
        scan.native_files,
        {library: dotted(version) for library, version in sorted(scan.needs.items())},
        packages,
        notes_on(system, packages),
    )


def notes_on(system: RobotSystem, packages: dict[str, str]) -> tuple[str, ...]:
    """Return what a runtime of such packages cannot do on a robot, and what to do about it."""
    notes = []
    onnxruntime = packages.get("onnxruntime")
    if onnxruntime is not None and not admits(CPU.runtime_versions, onnxruntime):
        notes.append(
            f"bundles for {CPU.name} do not run on it: they need ONNX Runtime "
            f"{CPU.runtime_versions}, Python {system.python} has {onnxruntime} at most; give a "
            "newer Python with --python"
        )
    if "cuda-bindings" not in packages:
        notes.append(
            "TensorRT engines need cuda-bindings or pycuda in the robot's own Python; make the "
            "lock again, without --lock"
        )
    return tuple(notes)


def _place(output: Path, packed: Path, lock: Path, built: BuiltRuntime) -> None:
    """Give the files their names; the description last, it vouches for the others."""
    write_bytes(output.with_suffix(".lock"), lock.read_bytes())
    with packed.open("rb") as opened:
        os.fsync(opened.fileno())
    packed.chmod(0o755)
    packed.replace(output)
    sync_folder(output.parent)
    write_json(output.with_suffix(".json"), built.to_json())

"""The noun `BundleFacts`: what is known of a bundle and its engines without running them."""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from engines.targets import find_target
from engines.trt.admission import admit_sidecar
from engines.trt.builder import BuildSettings
from engines.trt.modules import BuildError, TrtModule, is_tensorrt, load_module
from engines.trt.sidecar import Sidecar, engine_folder, engine_path
from jetson.board.state import BoardState
from qvla_export.shared.artifacts import sha256_file
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Target

# Code of kernels in a part's engine, whatever its weights: 5 to 23 MB (TensorRT for RTX 1.7.1).
_CODE_BYTES = 32_000_000
# Runtime and compute capability of an Orin's targets.
_ORIN = "tensorrt", "sm_87"
NO_ORIN = "this is no Orin"


@dataclass(frozen=True)
class EngineFacts:
    """One part's engine."""

    part: str
    # What its builder stated; None with a problem.
    sidecar: Sidecar | None
    # Why it would be refused whatever the machine; empty if it would not.
    problem: str = ""


@dataclass(frozen=True)
class BundleFacts:
    """A bundle, or why it cannot be opened; and its engines if its target has any."""

    path: Path
    bundle: Bundle | None
    target: Target | None
    # Why there is no bundle or target; empty if there is.
    problem: str = ""
    # Folder of the engines; and of each part, empty where the runtime runs the bundle itself.
    engines: Path = Path()
    parts: tuple[EngineFacts, ...] = ()
    # Module of a TensorRT target; or why it cannot be used.
    module: TrtModule | None = None
    module_problem: str = ""
    free_disk_bytes: int | None = None

    @property
    def is_tensorrt(self) -> bool:
        """Whether the target's engines are built by TensorRT."""
        return self.target is not None and is_tensorrt(self.target)

    @property
    def must_build(self) -> bool:
        """Whether engines are to be built before the bundle runs."""
        return self.is_tensorrt and any(part.sidecar is None for part in self.parts)

    def is_for_another(self, board: BoardState) -> bool:
        """Say whether the bundle is for an Orin and this machine is no Jetson."""
        target = self.target
        for_orin = target is not None and (target.runtime, target.compute_capability) == _ORIN
        return for_orin and not board.is_jetson

    @property
    def power_mode(self) -> str | None:
        """Power mode in which the engines' kernels were timed; None if not known."""
        known = [part.sidecar.power_mode for part in self.parts if part.sidecar is not None]
        return next((mode for mode in known if mode), None)

    @property
    def shell_path(self) -> str:
        """The bundle's path as a shell reads it."""
        return shlex.quote(str(self.path))

    @property
    def build_command(self) -> str:
        """Return what builds the engines that are missing or refused."""
        elsewhere = self.bundle is not None and self.engines != engine_folder(self.bundle)
        output = f" --output {shlex.quote(str(self.engines))}" if elsewhere else ""
        return f"qvla build {self.shell_path}{output}"

    @property
    def rebuild_command(self) -> str:
        """Return what builds all engines anew, even those that are up to date."""
        return f"rm {shlex.quote(str(self.engines))}/*.json && {self.build_command}"

    @property
    def memory_needed_bytes(self) -> int:
        """Bytes that building or loading takes, by an estimate from file sizes."""
        assert self.bundle is not None
        if self.must_build:
            return 2 * self.bundle.nbytes + BuildSettings().workspace_bytes
        sizes = [part.sidecar.engine_bytes for part in self.parts if part.sidecar is not None]
        return sum(sizes) + max(sizes) if sizes else 2 * self.bundle.nbytes

    @property
    def memory_needed_for(self) -> str:
        """Return what the estimate counts."""
        if self.must_build:
            return "graph and engine, and the builder's workspace"
        if self.parts:
            return "engines, and one's file while it loads"
        return "weights as read and as packed"

    @property
    def disk_needed_bytes(self) -> int:
        """Bytes that new engines take: the weights and each part's code."""
        assert self.bundle is not None
        return self.bundle.nbytes + _CODE_BYTES * len(self.bundle.parts)


def read_bundle(path: Path, engines: Path | None = None) -> BundleFacts:
    """Return what is known of a bundle; never an error.

    Args:
        path: the bundle's folder.
        engines: folder of its engines; None for the one beside it.
    """
    bundle: Bundle | None = None
    try:
        bundle = Bundle.load(path)
        target = find_target(bundle.target)
    except (QvlaError, OSError, ValueError) as error:
        return BundleFacts(path, bundle, None, _one_line(error))
    folder = engines or engine_folder(bundle)
    if not is_tensorrt(target):
        return BundleFacts(path, bundle, target, engines=folder)
    module, problem = _module(target)
    return BundleFacts(
        path,
        bundle,
        target,
        engines=folder,
        parts=tuple(_engine(bundle, index, folder) for index in range(len(bundle.parts))),
        module=module,
        module_problem=problem,
        free_disk_bytes=_free_bytes(folder),
    )


def _module(target: Target) -> tuple[TrtModule | None, str]:
    try:
        return load_module(target), ""
    # Its libraries are loaded by the import and fail as they like.
    except (BuildError, OSError, RuntimeError, ValueError) as error:
        return None, _one_line(error)


def _engine(bundle: Bundle, index: int, folder: Path) -> EngineFacts:
    part = bundle.parts[index]
    try:
        sidecar = admit_sidecar(bundle, part, folder)
        # Not `admit_engine`: it holds the whole engine in memory.
        found = sha256_file(engine_path(folder, part.name))
    except (QvlaError, OSError, TypeError, KeyError) as error:
        return EngineFacts(part.name, None, _one_line(error))
    if found != sidecar.engine_sha256:
        return EngineFacts(part.name, None, f"{part.name}.engine is not what was built here")
    return EngineFacts(part.name, sidecar)


def _free_bytes(folder: Path) -> int | None:
    for place in (folder, *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

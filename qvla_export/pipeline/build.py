"""The step that builds a bundle's TensorRT engines."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.progress import OnProgress, Progress, ignore
from qvla_export.shared.artifacts import require_same
from qvla_export.shared.tables.text_table import TextTable, megabytes

if TYPE_CHECKING:
    from engines.trt.builder import BuildSettings
    from engines.trt.sidecar import Sidecar
    from engines.verify import Verdict
    from qvla_export.shared.bundle import Bundle


@dataclass(frozen=True)
class BuiltEngines:
    """Engines of a bundle's parts, and whether they act as they must."""

    bundle: Path
    folder: Path
    sidecars: "tuple[Sidecar, ...]"
    # None where this machine has no GPU to run them on.
    verdict: "Verdict | None"

    @property
    def nbytes(self) -> int:
        """Bytes of the engine files."""
        return sum(sidecar.engine_bytes for sidecar in self.sidecars)

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla build --json` prints."""
        parts = {
            sidecar.origin.part: {
                "engine_bytes": sidecar.engine_bytes,
                "weights_bytes": sidecar.weights_bytes,
            }
            for sidecar in self.sidecars
        }
        verdict = None if self.verdict is None else self.verdict.to_json()
        return {"folder": str(self.folder), "parts": parts, "verdict": verdict}

    def texts(self) -> Iterator[str | TextTable]:
        """Yield the engines' sizes, and whether they were verified, for a terminal."""
        first = self.sidecars[0].origin
        title = f"{first.module} {first.module_version} for {first.compute_capability}"
        yield TextTable(("part", "engine, MB", "weights, MB"), title=title).with_rows(
            (s.origin.part, megabytes(s.engine_bytes), megabytes(s.weights_bytes))
            for s in self.sidecars
        )
        yield f"engines: {self.nbytes / 1e6:.2f} MB -> {self.folder}"
        if self.verdict is None:
            yield (
                "not verified: this machine has no NVIDIA GPU; on the device run qvla build, "
                f"then qvla verify {self.bundle}"
            )
            return
        drift = self.verdict.drift
        yield (
            f"verified: cosine {drift.cosine:.6f}, largest difference {drift.worst:.1e} "
            f"(normalized) on {drift.observations} observations"
        )


def require_target(bundle: "Bundle", target: str) -> None:
    """Refuse a bundle that was made for another target.

    Raises:
        UnknownTarget, ArtifactMismatch: the target is not in the table, or not the bundle's.
    """
    from engines.targets import find_target

    name = find_target(target).name
    remedy = f"Plan and export for it: qvla plan --target {name}, qvla export --target {name}."
    require_same("bundle and target", bundle.target, name, remedy)


def build(
    bundle: "Bundle",
    folder: Path | None = None,
    settings: "BuildSettings | None" = None,
    on_progress: OnProgress = ignore,
) -> BuiltEngines:
    """Build a bundle's engines and, where the GPU is, verify them.

    Raises:
        BuildError: they cannot be built here; see `engines.trt.builder.build_engines`.
        VerificationError: they do not act as they must.
    """
    from engines.load import load_engine
    from engines.trt.gpu import find_gpu
    from engines.trt.sidecar import engine_folder
    from engines.verify import judge

    folder = folder or engine_folder(bundle)
    sidecars = build_bundle(bundle, folder, settings, on_progress)
    if find_gpu() is None:
        return BuiltEngines(bundle.path, folder, sidecars, None)
    with load_engine(bundle, engines=folder) as engine:
        verdict = judge(bundle, engine)
    verdict.require_passed()
    return BuiltEngines(bundle.path, folder, sidecars, verdict)


def build_bundle(
    bundle: "Bundle",
    folder: Path | None = None,
    settings: "BuildSettings | None" = None,
    on_progress: OnProgress = ignore,
) -> "tuple[Sidecar, ...]":
    """Build a bundle's engines, which nobody has verified yet; those up to date are kept.

    Raises:
        BuildError: they cannot be built here; see `engines.trt.builder.build_engines`.
    """
    from engines.trt.builder import build_engines
    from engines.trt.sidecar import engine_folder

    def report(part: str, phase: str, done: int, steps: int) -> None:
        on_progress(Progress(f"engine of {part}: {phase}", done, steps))

    return build_engines(bundle, folder or engine_folder(bundle), settings, report)


def engines_or_why_not(
    bundle: "Bundle", on_progress: OnProgress = ignore
) -> "tuple[tuple[Sidecar, ...] | None, str | None]":
    """Return a bundle's engines, built if they were absent; or why there are none."""
    from engines.targets import find_target
    from engines.trt.modules import BuildError, is_tensorrt

    target = find_target(bundle.target)
    if not is_tensorrt(target):
        return None, f"{target.runtime} runs the bundle itself"
    try:
        return build_bundle(bundle, on_progress=on_progress), None
    except BuildError as error:
        return None, str(error)
